"""The engine alone: chunks in, frames out, through StreamPlan, stages and autoencoder."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from shared.engine.stepper import Stepper
from tests.support.engine import clip, prompt, stepper_of


def feed(stepper: Stepper, streams: dict[str, int], chunks: int) -> dict[str, Tensor]:
    """Stream → seed of its clip. Feeds every chunk, flushes, returns all frames shown."""
    shown: dict[str, list[Tensor]] = {name: [] for name in streams}
    clips = {name: clip(seed, 4 * chunks + 1) for name, seed in streams.items()}
    for index in range(chunks + 4):
        part = slice(0, 5) if index == 0 else slice(4 * index + 1, 4 * index + 5)
        due = {name: pixels[part] for name, pixels in clips.items()} if index < chunks else {}
        for name, frames in stepper.tick(due).items():
            shown[name].append(frames)
    return {name: torch.cat(parts) for name, parts in shown.items()}


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_every_frame_that_goes_in_comes_out(steps: int) -> None:
    stepper = stepper_of()
    stepper.open("a", 96, 64, prompt(1), steps=steps)
    out = feed(stepper, {"a": 1}, 6)["a"]
    assert out.shape == (25, 64, 96, 3)
    assert out.dtype == torch.uint8


def test_pixels_do_not_depend_on_company_or_on_the_split() -> None:
    def alone(stages: int) -> Tensor:
        stepper = stepper_of(stages=stages)
        stepper.open("a", 96, 64, prompt(1), steps=2, seed=5)
        return feed(stepper, {"a": 1}, 8)["a"]

    reference = alone(1)
    together = stepper_of()
    for name, seed in (("z", 9), ("a", 5), ("b", 6)):
        together.open(name, 96, 64, prompt(ord(name) if name != "a" else 1), steps=2, seed=seed)
    crowd = feed(together, {"z": 3, "a": 1, "b": 2}, 8)
    for other in (alone(2), alone(3), crowd["a"]):
        assert int((other.int() - reference.int()).abs().max()) <= 1
    assert not torch.equal(crowd["b"], crowd["a"])


def test_steps_go_up_and_down_without_losing_a_frame() -> None:
    stepper = stepper_of()
    stepper.open("a", 96, 64, prompt(1), steps=2)
    pixels = clip(1, 41)
    frames = 0
    for index in range(10):
        stepper.set_steps("a", (2, 4, 1)[index // 4])
        part = pixels[:5] if index == 0 else pixels[4 * index + 1 : 4 * index + 5]
        frames += sum(map(len, stepper.tick({"a": part}).values()))
    for _ in range(4):
        frames += sum(map(len, stepper.tick({}).values()))
    assert frames == 41


def test_a_new_prompt_changes_the_pictures_that_enter_after_it() -> None:
    def run(change_at: int | None) -> Tensor:
        stepper = stepper_of()
        stepper.open("a", 96, 64, prompt(1), steps=1)
        pixels, shown = clip(1, 33), []
        for index in range(8):
            if index == change_at:
                stepper.set_prompt("a", prompt(2))
            part = pixels[:5] if index == 0 else pixels[4 * index + 1 : 4 * index + 5]
            shown.append(stepper.tick({"a": part})["a"])
        return torch.cat(shown)

    same, changed = run(None), run(4)
    assert torch.equal(same[:17], changed[:17])
    assert not torch.equal(same[17:], changed[17:])


def test_a_long_stream_passes_the_rope_refresh() -> None:
    stepper = stepper_of()
    stepper.open("a", 96, 64, prompt(1), steps=2)
    out = feed(stepper, {"a": 4}, 55)["a"]
    assert len(out) == 221
    stepper.close("a")
    assert all(stage.memory().slots == 0 for stage in stepper.stages)
