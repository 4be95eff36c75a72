"""The shipped weights, quickly: they load, they are small, prompts reach their style, and a short stream shows it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench.changes import change_prompt
from bench.clips import with_motion
from bench.quality import PROMPTS
from bench.rig import Rig, decibels, squared_errors
from shared.engine.plan.registry import EMBEDDED_MODEL, model_folder
from shared.engine.plan.spec import ModelSpec, spec_of
from training.filters import NO_STYLE, stylise
from training.procedural import make_clip
from training.prompts import all_styles
from training.train_text import nearest_code, style_codes

FOLDER = model_folder(EMBEDDED_MODEL)
HEIGHT, WIDTH, FRAMES = 128, 160, 17


@pytest.fixture(scope="module")
def spec() -> ModelSpec:
    torch.set_num_threads(1)
    return ModelSpec.from_json(FOLDER / "spec.json")


@pytest.fixture(scope="module")
def rig(spec: ModelSpec) -> Rig:
    return Rig(spec, FOLDER, steps=2, seed=0)


@pytest.fixture(scope="module")
def clip() -> torch.Tensor:
    """A procedural clip that no training pool holds: uint8 [n, H, W, 3]."""
    return torch.from_numpy(make_clip(2_000_003, FRAMES, HEIGHT, WIDTH)).permute(0, 2, 3, 1).contiguous()


def truths(clip: torch.Tensor) -> dict[str, torch.Tensor]:
    pixels = clip.permute(0, 3, 1, 2).float() / 255
    return {style: stylise(style, pixels).permute(0, 2, 3, 1) for style in all_styles()}


def test_the_weights_are_small_and_have_a_card():
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 32 * 2**20
    assert "procedural" in Path(FOLDER / "README.md").read_text(encoding="utf-8")


def test_steps_decrease_and_later_steps_lie_below_any_default_first_step(spec: ModelSpec):
    assert list(spec.steps) == sorted(set(spec.steps), reverse=True)
    assert 1000 * (spec.noise.s0 - spec.noise.gain) - spec.noise.first_step_margin > spec.steps[1]
    assert spec.noise.s0 >= 0.5


@pytest.mark.parametrize(
    ("prompt", "style"),
    [
        *((prompt, style) for style, prompt in PROMPTS.items()),
        ("", NO_STYLE),
        ("a cat walking in the grass", NO_STYLE),
        ("a blueprint drawing of a cat", "blueprint"),
        ("make it look like an old film", "sepia"),
        ("NEON!!! 🔥🔥", "neon"),
        ("zorble wug a pencil sketch flirp, 4k, masterpiece", "pencil"),
        ("watercolor", "watercolour"),
        ("turn this into an 8 bit game", "pixel art"),
        ("a church window of a woman", "stained glass"),
        ("northern lights over the sea", "aurora"),
        ("andy warhol", "pop art"),
        ("heat vision " * 330, "thermal"),
    ],
)
def test_a_free_prompt_reaches_its_style(rig: Rig, prompt: str, style: str):
    names = all_styles()
    vectors = rig.text.encode(prompt)[None]
    codes = style_codes(len(names), rig.spec.text_len, rig.spec.text_dim)
    assert names[int(nearest_code(vectors, codes))] == style


def test_the_autoencoder_shows_the_clip(rig: Rig, clip: torch.Tensor):
    error = squared_errors(rig.reconstruct(clip), {NO_STYLE: clip.float() / 255})[NO_STYLE]
    assert decibels(float(error.mean())) > 20.5


def test_no_style_shows_the_source_through_the_model(rig: Rig, clip: torch.Tensor):
    made = rig.restyle(clip, "no style")
    assert made.shape == clip.shape
    assert decibels(float(squared_errors(made, {NO_STYLE: clip.float() / 255})[NO_STYLE].mean())) > 19.5


@pytest.mark.parametrize("style", ["pencil", "neon", "thermal", "x-ray", "pixel art", "stained glass"])
def test_a_streamed_clip_lies_nearest_to_its_own_style(rig: Rig, clip: torch.Tensor, style: str):
    made = rig.restyle(clip, PROMPTS[style])
    errors = squared_errors(made, truths(clip))
    nearest = torch.stack(list(errors.values())).argmin(0)
    own = list(errors).index(style)
    assert (nearest == own).float().mean() >= 0.8


@pytest.mark.parametrize("steps", [1, 3, 4])
def test_any_number_of_steps_keeps_the_style(spec: ModelSpec, clip: torch.Tensor, steps: int):
    made = Rig(spec, FOLDER, steps=steps, seed=1).restyle(clip[:9], PROMPTS["thermal"])
    errors = squared_errors(made, truths(clip[:9]))
    assert min(errors, key=lambda style: float(errors[style].mean())) == "thermal"


def test_the_same_seed_gives_the_same_pixels(spec: ModelSpec, rig: Rig, clip: torch.Tensor):
    again = Rig(spec, FOLDER, steps=2, seed=0)
    assert torch.equal(rig.restyle(clip[:9], "neon"), again.restyle(clip[:9], "neon"))


def test_a_new_prompt_shows_within_two_chunks_without_a_broken_frame_and_a_blend_is_gradual(
    rig: Rig, clip: torch.Tensor
):
    source = with_motion(clip, "moderate", 37)
    styles = ("thermal", "x-ray")
    prompts = (PROMPTS["thermal"], PROMPTS["x-ray"])
    at_once, blended = (change_prompt(rig, source, styles, prompts, blend) for blend in (0, 4))
    assert 1 <= at_once.chunks_until <= 2
    assert at_once.broken == 0
    assert blended.largest_jump < 0.75 * at_once.largest_jump
    assert blended.shares[-1] > 0.5


def test_what_is_published_is_what_is_trained() -> None:
    """The preset that training starts from, with the run's own statistics of latents and nothing else changed."""
    published, preset = ModelSpec.from_json(FOLDER / "spec.json"), spec_of("rheo-tiny")
    names = ("latent_scale", "latent_shift", "vae_widths", "vae_encoder_width", "latent_channels", "encoder_normalised")
    assert replace(published, **{name: getattr(preset, name) for name in names}) == preset
