"""Similarity skip through ingest and egress: what stands still is skipped, held and counted; what moves is shown."""

from __future__ import annotations

from collections.abc import AsyncIterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import pytest_asyncio

from shared.contracts.commands import TakeStream
from shared.contracts.events import EventKind
from shared.tensors.shm import sweep_run
from tests.support import clips
from tests.support.media_bench import SHM, Bench, bench

pytestmark = [pytest.mark.integration, pytest.mark.asyncio]

FPS = 25
STILL, MOVING = 81, 24  # frames


@pytest_asyncio.fixture
async def media(tmp_path: Path, run_id: str) -> AsyncIterator[Bench]:
    async with bench(tmp_path, run_id, skip_longest_s=600.0) as running:
        yield running
    sweep_run(SHM, run_id)


def scene(path: Path) -> Path:
    """Nothing moves, then one small box does, then nothing again."""
    frames: list[np.ndarray] = []
    for index in range(STILL + MOVING + STILL):
        picture = np.full((64, 96, 3), 90, np.uint8)
        step = min(MOVING, max(0, index - STILL + 1))
        picture[16:32, 2 * step : 2 * step + 16] = 220
        frames.append(picture)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"crf": "1", "preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for picture in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    return path


async def test_static_scenes_cost_almost_nothing_and_the_first_moving_frame_is_shown(
    media: Bench, tmp_path: Path
) -> None:
    output = tmp_path / "out.mp4"
    event = await media.run(scene(tmp_path / "in.mp4"), output, skip_similar=0.1)
    assert event.event is EventKind.STOPPED, event.reason
    totals = event.totals
    assert totals is not None
    frames = 2 * STILL + MOVING
    assert totals.frames_in == totals.closed == frames
    assert totals.dropped == {}
    assert totals.skipped > STILL, "most of what stands still"
    sent = {frame.index for chunk in media.chunks for frame in chunk.stamp.frames}
    assert set(range(STILL, STILL + MOVING)) <= sent, "what moves is never skipped, from its first frame on"
    assert totals.on_time == len(sent) == frames - totals.skipped
    shown = clips.timestamps(output)
    assert len(shown) == len(sent)
    assert [round(at * FPS) for at in shown] == sorted(sent), "each at its own time: the last picture is held"


async def test_off_unless_asked_for_and_it_can_be_switched_while_it_runs(media: Bench, tmp_path: Path) -> None:
    source = scene(tmp_path / "in.mp4")
    event = await media.run(source)
    assert event.totals is not None
    assert event.totals.skipped == 0
    media.ended.clear()
    media.chunks.clear()
    stream = await media.begin(source, skip_similar=0.1, mode="live", fps=FPS, size=(96, 64), credits=16)
    spec = (await media.store.get(stream) or {})["spec"]
    while len(media.chunks) < 5:
        await media.wait_for_chunk()
    off = TakeStream(
        instance="ingest-0",
        stream=stream,
        epoch=1,
        spec=spec,
        width=96,
        height=64,
        noise=0.5,
        credits=16,
        skip_similar=0.0,
        refreshes=1,
    )
    assert await media.take("ingest", off) is None
    event = await media.end()
    assert event.totals is not None
    assert event.totals.frames_in == event.totals.closed == 2 * STILL + MOVING
    assert event.totals.skipped <= 8, "only what was skipped before it was told"
    assert Fraction(event.totals.on_time + event.totals.skipped, event.totals.frames_in) > Fraction(9, 10)
