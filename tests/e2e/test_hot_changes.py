"""Everything that may change while a stream runs, through the whole system; each change is told with its chunk."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio

from shared.contracts.commands import Mode, NoSource, PatternSource
from shared.contracts.events import EventKind
from tests.e2e.conftest import Rheocast
from tests.support import clips
from tests.support.lab import Lab, Running, difference, frames_of, reconciles

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(300)]

AS_ASKED = {"mode": Mode.LIVE, "fps": 16, "min_fps": 16, "min_steps": 2, "width": 96, "height": 64, "deadline_ms": 3000}
"""A live stream that keeps its steps and rate on a slow machine too: what changes here is what the test changes."""


@pytest_asyncio.fixture(loop_scope="module", scope="module", params=[1, 2], ids=["one stage", "two stages"])
async def lab(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Lab]:
    async with Lab.start(tmp_path_factory.mktemp("hot"), stages=request.param) as lab:
        yield lab


def entering(lab: Lab, running: Running) -> list[dict[str, Any]]:
    """The stream's blocks as they entered step 0, in order."""
    items = [item for batch in lab.batches() for item in batch["items"] if item["stream"] == running.stream]
    return sorted((item for item in items if item["step"] == 0), key=lambda item: item["block"])


def first_with(lab: Lab, running: Running, **values: Any) -> dict[str, Any]:
    """The first block that was bound to these values."""
    return next(b for b in entering(lab, running) if all(b[k] == v for k, v in values.items()))


async def test_each_change_binds_whole_blocks_and_is_told_with_its_chunk(lab: Lab) -> None:
    beside = clips.make_clip(lab.folder / "beside.mp4", frames=61, width=160, height=96, seed=3)
    alone = await lab.run(beside, lab.folder / "alone.mp4", seed=4)
    running = await lab.begin(PatternSource(), **AS_ASKED)
    assert running.accepted, running.events
    other = await lab.begin(beside, lab.folder / "company.mp4", seed=4)

    seeded = await lab.update(running, seed=77)
    assert first_with(lab, running, seed=77)["chunks"][0] == seeded.chunk
    fewer = await lab.update(running, steps=1)
    assert first_with(lab, running, steps=1)["chunks"][0] == fewer.chunk
    more = await lab.update(running, steps=3, min_steps=3)
    assert first_with(lab, running, steps=3)["chunks"][0] == more.chunk
    await lab.update(running, steps=2, min_steps=2)
    longer = await lab.update(running, frames_per_block=2)
    first = next(b for b in entering(lab, running) if len(b["chunks"]) == 2)
    assert first["chunks"][0] == longer.chunk
    await lab.update(running, frames_per_block=1)

    noise = await lab.update(running, noise=0.2)
    blocks = {b["chunks"][0]: b["noise"] for b in entering(lab, running)}
    assert blocks[noise.chunk] < 0.3 < blocks[max(n for n in blocks if n < noise.chunk)]

    anew = await lab.update(running, prompt="neon lights", recache=True)
    assert anew.version == 2
    bound = first_with(lab, running, prompt=2)
    assert bound["chunks"][0] == anew.chunk
    assert bound["context"] > 0
    fade = await lab.update(running, prompt="a thermal camera", blend_chunks=4)
    assert fade.until_chunk == fade.chunk + 4
    await asyncio.sleep(2.0)
    shares = [b["blend"][1] for b in entering(lab, running) if b["prompt"] == 3 and b["blend"]]
    assert 1 <= len(shares) <= 4
    assert all(a > b for a, b in itertools.pairwise(shares))
    assert entering(lab, running)[-1]["blend"] == []

    refused = await lab.update(running, frames_per_block=3, steps=4)
    assert refused.event is EventKind.APPLIED, "rheo-tiny takes both"
    event = await lab.stop(running)
    assert event.event is EventKind.STOPPED, event.reason
    assert reconciles(event)

    await lab.end(other)
    assert other.output is not None
    assert alone.output is not None
    assert difference(frames_of(other.output), frames_of(alone.output)) <= 1, "the stream beside it noticed nothing"


async def test_pause_and_resume_through_the_whole_system(lab: Lab) -> None:
    running = await lab.begin(PatternSource(), **AS_ASKED, frames_per_block=3)
    assert running.accepted, running.events
    await asyncio.sleep(1.5)
    paused = await lab.update(running, paused=True)
    assert paused.reason == "paused"
    await asyncio.sleep(1.2)
    newest = entering(lab, running)[-1]["chunks"][-1]
    assert newest == paused.chunk, "chunks that do not fill a frame block are not left behind"
    resumed = await lab.update(running, paused=False)
    assert resumed.chunk == paused.chunk + 1
    await asyncio.sleep(2.2)
    event = await lab.stop(running)
    assert event.event is EventKind.STOPPED, event.reason
    assert reconciles(event)
    assert event.totals is not None
    lost = {reason for reason in event.totals.dropped if not reason.startswith("ingest:")}
    assert lost <= {"scheduler:stale"}, event.totals.dropped
    assert entering(lab, running)[-1]["chunks"][-1] > resumed.chunk + 2


async def test_text_to_video_depends_on_prompt_and_seed_alone(lab: Lab) -> None:
    made: list[np.ndarray] = []
    for name, prompt, seed in (
        ("a", "neon lights", 1),
        ("b", "neon lights", 1),
        ("c", "sepia", 1),
        ("d", "sepia", 2),
    ):
        running = await lab.run(NoSource(frames=13), lab.folder / f"text-{name}.mp4", fps=16, prompt=prompt, seed=seed)
        assert running.last.event is EventKind.STOPPED, running.last.reason
        assert running.output is not None
        made.append(frames_of(running.output))
    a, b, c, d = made
    assert a.shape == (13, 96, 160, 3)
    assert difference(a, b) == 0
    assert difference(a, c) > 20
    # A model that has not learnt to begin from pure noise lets a seed change everything a little, where not all is black.
    assert float(np.mean(c != d)) > 0.5
    endless = await lab.begin(NoSource(), mode=Mode.LIVE, fps=16, width=96, height=64)
    assert endless.accepted, endless.events
    refused = await lab.update(endless, noise=0.5)
    assert refused.event is EventKind.REFUSED
    assert "leave noise out" in refused.reason
    async with asyncio.timeout(20):
        while not entering(lab, endless):  # before that nothing is seen that could fade
            await asyncio.sleep(0.05)
    changed = await lab.update(endless, prompt="sepia", blend_chunks=2, recache=True)
    assert (changed.event, changed.until_chunk) == (EventKind.APPLIED, changed.chunk + 2)
    event = await lab.stop(endless)
    assert event.event is EventKind.STOPPED, event.reason
    assert reconciles(event)


@pytest.mark.asyncio(loop_scope="function")
async def test_generate_from_the_command_line(rheocast: Rheocast, tmp_path: Path) -> None:
    done = rheocast("generate", "made.mp4", "--prompt", "neon lights", "--seconds", "1", "--size", "96x64", "--json")
    assert done.code == 0, done.err
    assert done.summary["frames_out"] == len(frames_of(tmp_path / "made.mp4")) > 10
    refused = rheocast("generate", "made.avi", "--prompt", "neon")
    assert refused.code == 2
    assert "*.mp4" in refused.err
