"""The last layer trained alone: lessons are what the blocks give, and the blocks stay as they are."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from shared.engine.model.dit import Dit, unpatchify
from shared.engine.model.loading import load_tiny_vae
from shared.engine.plan.registry import model_folder
from shared.engine.plan.spec import ModelSpec
from training.fast_dit import autocast, compute_dtype
from training.pairs import Pair
from training.train_dit import initialise
from training.train_head import HeadTrainer, head_only

FOLDER = model_folder("rheo-tiny")
CLOSE = 1e-4 if compute_dtype() == torch.float32 else 0.05
"""In bfloat16 a row may depend on its company in the last of its eight bits."""
SPEC = replace(ModelSpec.from_json(FOLDER / "spec.json"), dim=64, ffn_dim=64, layers=2, heads=2, cell_dim=16)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def trainer() -> HeadTrainer:
    torch.manual_seed(0)
    model = Dit(SPEC)
    initialise(model)
    torch.nn.init.normal_(model.head.head.weight, std=0.05)
    prompts = [torch.randn(2, SPEC.text_len, SPEC.text_dim) for _ in range(3)]
    made = HeadTrainer(model, load_tiny_vae(SPEC, FOLDER), prompts, SPEC)
    made.watch()
    return made


def pairs() -> list[Pair]:
    nothing = torch.empty(0)
    return [Pair(10 * torch.randn(8, 48, 4, 6), 10 * torch.randn(8, 48, 4, 6), style, nothing) for style in (1, 2)]


def test_a_lesson_gives_through_the_head_what_the_whole_model_gave(
    trainer: HeadTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Tensor] = []
    estimate = trainer.estimate
    monkeypatch.setattr(trainer, "estimate", lambda *args: given.append(estimate(*args)) or given[-1])
    rng, kinds = np.random.default_rng(3), set[bool]()
    for _ in range(12):
        given.clear()
        lessons = trainer.lessons(rng, pairs())
        whole = [x0 for x0 in given if x0.shape[1] == 8]
        kinds.add(len(whole) > 1)
        for i, lesson in enumerate(lessons):
            with torch.no_grad(), autocast():
                made = trainer.model.head(
                    *(part[None] for part in (lesson.x, lesson.e, lesson.noisy, lesson.sigma)),
                    (lesson.keys[None], lesson.values[None]),
                )
                x0 = trainer.model.clean(lesson.noisy[None], lesson.sigma[None], unpatchify(made, 2, 3))
            torch.testing.assert_close(x0[0], whole[-1][i], rtol=CLOSE, atol=CLOSE)
    assert kinds == {False, True}, "first steps, and later ones now and then"


def test_only_the_head_learns(trainer: HeadTrainer) -> None:
    lessons = trainer.lessons(np.random.default_rng(0), pairs())
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    chosen = head_only(trainer.model, 3e-3)
    losses: list[float] = []
    for _ in range(20):
        loss, parts = trainer.lesson_loss(lessons)
        for each in chosen:
            each.zero_grad(set_to_none=True)
        loss.backward()
        for each in chosen:
            each.step()
        losses.append(parts["entry"])
    assert losses[-1] < 0.9 * losses[0]
    changed = {name for name, value in trainer.model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert all(name.startswith("head.") for name in changed)
