"""The DiT's training as one run: all kinds of steps, a stop and going on, and a model folder at the end that loads."""

from __future__ import annotations

import csv
import json
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from shared.engine.model.dit import Dit
from shared.engine.model.loading import load_tiny_vae
from shared.engine.plan.registry import model_folder
from shared.engine.plan.spec import ModelSpec
from training import publish as publishing
from training import train_dit
from training.fast_dit import block_forward
from training.pairs import Pair
from training.procedural import make_clip
from training.runs import save_checkpoint
from training.side_by_side import Fellows
from training.train_dit import Trainer, initialise, optimisers, prompt_bank, train

FOLDER = model_folder("rheo-tiny")
SHIPPED = ModelSpec.from_json(FOLDER / "spec.json")
SMALL = {"dim": 64, "ffn_dim": 64, "layers": 2, "heads": 2, "cell_dim": 16}
STEPS = 14  # of which the twelfth takes clips of the larger size


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A DiT and pictures that train in a moment, and no compiler."""
    torch.set_num_threads(1)
    real = publishing.tiny_spec
    for module in (train_dit, publishing):
        monkeypatch.setattr(module, "tiny_spec", lambda run: replace(real(run), **SMALL))
    monkeypatch.setattr(train_dit, "SIZES", ((32, 48, 4), (64, 96, 2)))
    monkeypatch.setattr(train_dit, "PATH_CLIPS", 6)
    monkeypatch.setattr(train_dit, "compiled_block", lambda: block_forward)
    monkeypatch.setattr(
        train_dit, "prompt_bank", lambda encoder, styles, _, seed: prompt_bank(encoder, styles, 3, seed)
    )


@pytest.fixture
def args(tmp_path: Path) -> Namespace:
    run, pool = tmp_path / "run", tmp_path / "pool"
    run.mkdir()
    pool.mkdir()
    for name in ("vae", "text"):
        weights = load_file(FOLDER / f"{name}.safetensors")
        save_file(
            {k: v.float() if v.is_floating_point() else v for k, v in weights.items()}, run / f"{name}.safetensors"
        )
    statistics = {"mean": SHIPPED.latent_shift, "scale": SHIPPED.latent_scale}
    (run / "latents.json").write_text(json.dumps(statistics))
    np.save(pool / "clips.npy", np.stack([make_clip(3, 29, 96, 160)] * 10))
    return Namespace(
        pool=pool, run=run, publish=tmp_path / "model", begin_with=None, steps=STEPS, minutes=0, lr=2e-3, large_from=0.4,
        pixels_from=0.2, often=("pencil",), report=5, threads=1, seed=3,
    )  # fmt: skip


def test_a_run_that_was_stopped_goes_on_and_ends_with_a_model_that_loads(
    args: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(path: Path, state: dict[str, Any]) -> None:
        save_checkpoint(path, state)
        raise KeyboardInterrupt

    with monkeypatch.context() as first:
        first.setattr(train_dit, "save_checkpoint", stopped)
        with pytest.raises(KeyboardInterrupt):
            train(args, Fellows())
    begun = load_file(args.run / "dit.safetensors")
    train(args, Fellows())

    with (args.run / "dit.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [5, 10, STEPS]
    seconds = [float(row["seconds"]) for row in rows]
    assert seconds == sorted(seconds), "time goes on where the stopped run was"
    assert float(rows[-1]["later"]) > 0
    assert float(rows[-1]["pixel"]) > 0
    spec = ModelSpec.from_json(args.publish / "spec.json")
    model = Dit(spec)
    model.load_state_dict(load_file(args.publish / "dit.safetensors"))
    ended = load_file(args.run / "dit.safetensors")
    assert all(torch.isfinite(value).all() for value in ended.values())
    assert not torch.equal(begun["head.head.weight"], ended["head.head.weight"])


def test_a_run_goes_on_from_another_models_weights(args: Namespace, tmp_path: Path) -> None:
    args.steps = 1
    train(args, Fellows())
    args.begin_with, args.run = args.publish, tmp_path / "second"
    args.run.mkdir()
    for name in ("vae.safetensors", "text.safetensors", "latents.json"):
        (args.run / name).symlink_to(tmp_path / "run" / name)
    args.publish, args.lr = None, 0.0
    train(args, Fellows())
    before, after = load_file(args.begin_with / "dit.safetensors"), load_file(args.run / "dit.safetensors")
    translated = {
        "patch_embedding.weight",
        "head.head.weight",
        "head.head.bias",
    }  # from code to code: here the same one
    assert before.keys() == after.keys()
    for name in before.keys() - translated:
        torch.testing.assert_close(after[name], before[name].float(), msg=name)
    for name in translated:
        difference = torch.dist(after[name], before[name].float()) / before[name].float().norm()
        assert difference < 0.1, name


def test_what_is_seen_again_and_again_is_learned() -> None:
    torch.manual_seed(0)
    spec = replace(SHIPPED, **SMALL)
    model = Dit(spec)
    initialise(model)
    prompts = [torch.randn(2, spec.text_len, spec.text_dim) for _ in range(3)]
    trainer = Trainer(model, load_tiny_vae(spec, FOLDER), prompts, spec)
    source = 40 * torch.randn(2, 8, 48, 4, 6)
    pairs = [
        Pair(z, factor * z, style, torch.empty(0)) for z, factor, style in zip(source, (1, -1), (1, 2), strict=True)
    ]
    rng, losses = np.random.default_rng(0), list[float]()
    steppers = optimisers(model, 5e-3)
    for _ in range(60):
        loss, parts = trainer.losses(rng, pairs, with_pixels=False, with_later=False)
        for each in steppers:
            each.zero_grad(set_to_none=True)
        loss.backward()
        for each in steppers:
            each.step()
        losses.append(parts["entry"])
    assert np.mean(losses[-5:]) < 0.6 * np.mean(losses[:5])
    assert (trainer.weights.errors[1:] > 0).all()
