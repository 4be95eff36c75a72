"""Procedural clips and true filters: the same seed gives the same clip, and no style flickers or looks like another."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from training.filters import FILTERS, NO_STYLE, stylise
from training.procedural import make_clip
from training.prompts import PHRASES, all_styles, sample_prompt


@pytest.fixture(scope="module")
def clips() -> torch.Tensor:
    torch.set_num_threads(1)
    return torch.stack([torch.from_numpy(make_clip(seed, 6, 64, 96)) for seed in range(6)]).float() / 255


def test_a_clip_is_a_function_of_its_seed():
    first = make_clip(3, 9, 32, 48)
    assert first.shape == (9, 3, 32, 48)
    assert first.dtype == np.uint8
    assert np.array_equal(first, make_clip(3, 9, 32, 48))
    assert not np.array_equal(first, make_clip(4, 9, 32, 48))


def test_clips_move_and_have_contrast(clips: torch.Tensor):
    assert (clips.std((1, 2, 3, 4)) > 0.03).float().mean() > 0.8
    assert ((clips[:, 1:] - clips[:, :-1]).abs().mean((1, 2, 3, 4)) > 1e-4).float().mean() > 0.5


@pytest.mark.parametrize("style", list(FILTERS))
def test_a_filter_keeps_the_shape_and_the_range(clips: torch.Tensor, style: str):
    made = stylise(style, clips)
    assert made.shape == clips.shape
    assert made.dtype == torch.float32
    assert made.min() >= 0.0
    assert made.max() <= 1.0
    assert made.isfinite().all()


@pytest.mark.parametrize("style", list(FILTERS))
def test_a_filter_looks_at_one_frame_only(clips: torch.Tensor, style: str):
    assert torch.allclose(stylise(style, clips[0])[2], stylise(style, clips[0, 2]), atol=1e-6)


@pytest.mark.parametrize("style", list(FILTERS))
def test_a_small_change_of_the_picture_changes_the_style_little(clips: torch.Tensor, style: str):
    noise = torch.randn(clips.shape, generator=torch.Generator().manual_seed(1)) * 0.004
    change = (stylise(style, (clips + noise).clamp(0, 1)) - stylise(style, clips)).square().mean().sqrt()
    assert change < 0.04


def test_styles_are_told_apart_at_a_glance(clips: torch.Tensor):
    made = {style: stylise(style, clips) for style in FILTERS}
    for style, picture in made.items():
        for other, theirs in made.items():
            if style < other:
                assert (picture - theirs).square().mean().sqrt() > 0.07, f"{style} and {other} look alike"


def test_no_style_leaves_the_picture_alone(clips: torch.Tensor):
    assert torch.equal(stylise(NO_STYLE, clips), clips)


def test_an_unknown_style_is_an_error(clips: torch.Tensor):
    with pytest.raises(KeyError):
        stylise("oil", clips)


def test_every_style_can_be_asked_for_and_asking_is_repeatable():
    assert set(PHRASES) == set(all_styles())
    for style in all_styles():
        asked = [sample_prompt(np.random.default_rng(9), style) for _ in range(2)]
        assert asked[0] == asked[1]
        assert len({sample_prompt(np.random.default_rng(i), style) for i in range(30)}) > 15
