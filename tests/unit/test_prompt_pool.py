"""Prompts' keys and values: padding kept once changes nothing but the memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from shared.engine.model.loading import random_dit_weights
from shared.engine.model.prompt_pool import PromptPool
from shared.engine.plan.spec import ModelSpec
from shared.engine.stage import Stage
from tests.support.engine import HEIGHT, NANO, WIDTH, item, latents

CLOSE = 1e-5
LONG = replace(NANO, text_len=512)


def padded(words: int, seed: int = 0, spec: ModelSpec = LONG) -> Tensor:
    """An embedding of so many words, zeros behind them."""
    embedding = torch.zeros(spec.text_len, spec.text_dim)
    embedding[:words] = torch.randn(words, spec.text_dim, generator=torch.Generator().manual_seed(seed))
    return embedding


def stage_of(rows: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> Stage:
    torch.set_num_threads(1)
    monkeypatch.setattr("shared.engine.model.prompt_pool.ROWS", rows)
    stage = Stage.load(LONG, random_dit_weights(LONG, range(LONG.layers)))
    for name in "ab":
        stage.open(name, HEIGHT, WIDTH)
    return stage


def outputs(stage: Stage, prompts: dict[str, Tensor]) -> Tensor:
    for name, embedding in prompts.items():
        stage.set_prompt(name, 1, embedding)
    return stage.run([item(name, 0) for name in prompts], torch.stack([latents(0, 2)] * len(prompts)))


@pytest.mark.parametrize("words", [0, 1, 20, 63, 64, 130, 500, 512])
def test_padding_kept_once_gives_what_all_of_it_gives(words: int, monkeypatch: pytest.MonkeyPatch) -> None:
    short, whole = stage_of((64, 128, 256), monkeypatch), stage_of((), monkeypatch)
    mine, other = padded(words), padded(12, seed=1)
    for prompts in ({"a": mine}, {"a": mine, "b": other}, {"b": other}):
        assert torch.allclose(outputs(short, prompts), outputs(whole, prompts), atol=CLOSE)
    assert short._streams.prompts.rows == {0: 64, 1: 64, 20: 64, 63: 64, 64: 128, 130: 256, 500: 512, 512: 512}[words]
    if words < 256:
        assert short.memory().prompts < whole.memory().prompts / 1.9


def test_a_mixture_of_a_short_and_a_long_prompt_counts_its_padding_right(monkeypatch: pytest.MonkeyPatch) -> None:
    short, whole = stage_of((64, 128, 256), monkeypatch), stage_of((), monkeypatch)
    made = []
    for stage in (short, whole):
        stage.set_prompt("a", 1, padded(90, seed=2))
        stage.set_prompt("a", 2, padded(5, seed=3))
        mixed = replace(item("a", 0), prompt_version=2, blend_version=1, blend=0.4)
        made.append(stage.run([mixed], latents(0, 2)[None]))
    assert torch.allclose(made[0], made[1], atol=CLOSE)


def test_a_long_prompt_lengthens_the_entries_that_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = stage_of((64, 128, 256), monkeypatch)
    before = outputs(stage, {"a": padded(20)})
    generation = stage._streams.prompts.generation
    stage.set_prompt("b", 1, padded(100, seed=5))
    assert stage._streams.prompts.generation == generation + 1
    assert torch.allclose(stage.run([item("a", 0)], latents(0, 2)[None]), before, atol=CLOSE)


def test_entries_are_used_again() -> None:
    pool = PromptPool(NANO, 1, torch.device("cpu"), torch.float32)
    kv = [(torch.ones(1, NANO.text_len, NANO.heads, NANO.head_dim),) * 2]
    first, second = pool.put(kv, 3), pool.put(kv, 3)
    assert pool.used == 2
    pool.give_back(first)
    assert pool.put(kv, 3) == first
    assert pool.put(kv, 3) not in (first, second)
    assert pool.bias(first) is None, "a model of few words keeps them all"
