"""What is merely odd is accepted and comes out whole."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import pytest_asyncio

from shared.contracts.events import EventKind
from tests.support import clips
from tests.support.lab import Lab, frames_of, reconciles

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(180)]

SMALL = {"width": 96, "height": 64}


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def lab(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Lab]:
    async with Lab.start(tmp_path_factory.mktemp("odd")) as lab:
        yield lab


CASES: dict[str, tuple[Callable[[Path], object], int]] = {
    "one-frame.mp4": (lambda path: clips.make_clip(path, frames=1, width=96, height=64), 1),
    "three-frames.mp4": (lambda path: clips.make_clip(path, frames=3, width=96, height=64), 3),
    "odd-size.mkv": (lambda path: clips.make_clip(path, frames=7, width=333, height=187, pix_fmt="yuv444p"), 7),
    "rotated.mp4": (lambda path: clips.make_rotated_clip(path, frames=6), 6),
    "ten-bit.mkv": (lambda path: clips.make_ten_bit_clip(path, frames=6), 6),
    "alpha.mov": (lambda path: clips.make_alpha_clip(path, frames=6), 6),
    "vfr.mp4": (lambda path: clips.make_vfr_clip(path, frames=11), 11),
    "jumping.mkv": (lambda path: clips.make_jumping_clip(path, frames=12), 12),
    "backward.ts": (lambda path: clips.make_backward_clip(path, frames=12), 12),
    "4k.mp4": (lambda path: clips.make_clip(path, frames=5, width=3840, height=2160), 5),
}


@pytest.mark.parametrize("name", list(CASES))
async def test_odd_sources_come_out_whole(lab: Lab, name: str) -> None:
    make, frames = CASES[name]
    make(lab.folder / name)
    output = lab.folder / f"{Path(name).stem}-out.mp4"
    running = await lab.run(lab.folder / name, output, **SMALL)
    assert running.last.event is EventKind.STOPPED, running.last.reason
    assert reconciles(running.last)
    assert len(frames_of(output)) == frames


@pytest.mark.parametrize(
    "prompt", ["a " + "very " * 799 + "blue one", "🎨✏️ 油絵 \u202e drawing \x00"], ids=["long", "emoji"]
)
async def test_odd_prompts_are_accepted(lab: Lab, prompt: str) -> None:
    clips.make_clip(lab.folder / "p.mp4", frames=5, width=96, height=64)
    running = await lab.run(lab.folder / "p.mp4", lab.folder / "p-out.mp4", prompt=prompt, **SMALL)
    assert running.last.event is EventKind.STOPPED, running.last.reason


async def test_a_file_that_breaks_in_the_middle_is_delivered_as_far_as_it_goes_and_told(lab: Lab) -> None:
    clips.make_broken_clip(lab.folder / "broken.mkv", frames=64)
    output = lab.folder / "broken-out.mp4"
    running = await lab.run(lab.folder / "broken.mkv", output, **SMALL)
    assert running.last.event is EventKind.STOPPED, running.last.reason
    assert reconciles(running.last)
    assert 8 <= len(frames_of(output)) < 64
    assert running.of(EventKind.WARNING), "the rest is told"
