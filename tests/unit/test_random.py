"""Noise is a function of (seed, latent frame, step)."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from shared.engine.random import KeyedNoise, epsilon
from tests.support.engine import item

SHAPE = (16, 8, 12)


def test_the_same_key_gives_the_same_noise_and_any_other_key_other_noise() -> None:
    assert torch.equal(epsilon(1, 2, 3, SHAPE), epsilon(1, 2, 3, SHAPE))
    keys = [(s, f, k) for s in (0, 1, -1, 2**63) for f in (0, 1, 255, 256, 10**6) for k in range(4)]
    drawn = torch.stack([epsilon(*key, SHAPE).flatten() for key in keys])
    likeness = torch.corrcoef(drawn) - torch.eye(len(keys))
    assert float(likeness.abs().max()) < 0.15, "no two keys share their noise"


def test_the_noise_is_standard_normal() -> None:
    drawn = torch.cat([epsilon(7, frame, 0, SHAPE).flatten() for frame in range(50)])
    assert drawn.dtype == torch.float32
    assert abs(float(drawn.mean())) < 0.02
    assert float(drawn.std()) == pytest.approx(1, abs=0.02)
    assert float((drawn.abs() > 3).float().mean()) == pytest.approx(0.0027, abs=0.001)


def test_another_process_draws_the_same() -> None:
    code = "from shared.engine.random import epsilon; print(epsilon(5, 77, 2, (4, 4)).flatten().tolist())"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert eval(out) == epsilon(5, 77, 2, (4, 4)).flatten().tolist()


def test_a_batch_draws_each_frame_by_its_own_key() -> None:
    items = [item("a", 0), item("b", 0)]
    drawn = KeyedNoise().draw(items, 1, SHAPE)
    assert drawn.shape == (2, 2, *SHAPE)
    for row in drawn:
        assert torch.equal(row, torch.stack([epsilon(11, 0, 1, SHAPE), epsilon(11, 1, 1, SHAPE)]))


def test_where_nothing_moves_every_frame_has_the_noise_of_the_first() -> None:
    moving, still = replace(item("a", 0), first_latent=40), replace(item("a", 0), first_latent=40, still=True)
    drawn = KeyedNoise().draw([moving, still], 0, SHAPE)
    assert torch.equal(drawn[0], torch.stack([epsilon(11, 40, 0, SHAPE), epsilon(11, 41, 0, SHAPE)]))
    assert torch.equal(drawn[1], torch.stack([epsilon(11, 0, 0, SHAPE)] * 2))
    assert not torch.equal(KeyedNoise().draw([still], 1, SHAPE), KeyedNoise().draw([still], 0, SHAPE)), "by step"


def test_negative_counts_are_refused() -> None:
    with pytest.raises(ValueError, match="count from 0"):
        epsilon(1, -1, 0, SHAPE)
