"""The shipped weights, quickly: they load, they are small, prompts reach their style, and a short stream shows it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench.quality import PROMPTS
from bench.rig import Rig, decibels, squared_errors
from shared.engine.plan.registry import EMBEDDED_MODEL, model_folder
from shared.engine.plan.spec import ModelSpec
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
    assert decibels(float(error.mean())) > 19


def test_no_style_shows_the_source_through_the_model(rig: Rig, clip: torch.Tensor):
    made = rig.restyle(clip, "no style")
    assert made.shape == clip.shape
    assert decibels(float(squared_errors(made, {NO_STYLE: clip.float() / 255})[NO_STYLE].mean())) > 17


@pytest.mark.parametrize("style", ["blueprint", "thermal", "sepia", "night vision"])
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
