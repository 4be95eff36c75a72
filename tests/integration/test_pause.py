"""Pause and resume at ingest, and a stream without a source: real handlers on a bus, an echo in place of the pipeline."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import pytest_asyncio

from shared.contracts import subjects
from shared.contracts.commands import Mode, NoSource, PatternSource, PauseStream, TakeStream
from shared.contracts.events import EventKind, StreamEvent
from tests.support import clips
from tests.support.media_bench import Bench, bench


@pytest_asyncio.fixture
async def media(tmp_path: Path, run_id: str) -> AsyncIterator[Bench]:
    async with bench(tmp_path, run_id, loss_timeout_s=0.5, stall_s=5.0) as running:
        yield running


async def until(what: Callable[[], object], timeout_s: float = 10.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not what():
            await asyncio.sleep(0.01)


async def pause(media: Bench, stream: str, paused: bool) -> StreamEvent:
    """Tell ingest, and wait for the applied event."""
    command = secrets.token_hex(4)
    message = PauseStream(instance="ingest-0", stream=stream, epoch=1, command=command, paused=paused)
    await media.bus.publish(subjects.assign("ingest"), message)
    found: list[StreamEvent] = []

    def heard() -> bool:
        found[:] = [e for e in media.events if e.command == command and e.event is EventKind.APPLIED]
        return bool(found)

    await until(heard)
    return found[0]


async def test_a_live_stream_pauses_at_a_chunk_and_is_on_time_again_at_once(media: Bench) -> None:
    stream = await media.begin(PatternSource(), mode=Mode.LIVE, fps=50)
    await until(lambda: len(media.chunks) >= 4)
    paused = await pause(media, stream, True)
    assert (paused.reason, paused.chunk) == ("paused", media.chunks[-1].stamp.chunk)
    assert paused.pts == media.chunks[-1].stamp.frames[-1].pts
    count = len(media.chunks)
    await asyncio.sleep(0.7)
    assert len(media.chunks) == count
    resumed = await pause(media, stream, False)
    await until(lambda: len(media.chunks) >= count + 4)
    after = media.chunks[count]
    assert (resumed.reason, resumed.chunk) == ("resumed", after.stamp.chunk)
    assert resumed.chunk == paused.chunk + 1
    # The pattern's clock stood still: it goes on where it was, give or take what was under way.
    gap = after.stamp.frames[0].index - media.chunks[count - 1].stamp.frames[-1].index
    assert gap < 20, "half a second of frames would be 35"
    await media.leave("ingest", stream)
    await asyncio.sleep(0.3)
    await media.leave("egress", stream)
    event = await media.end()
    assert event.totals is not None
    assert event.totals.closed == event.totals.frames_in
    assert event.totals.late == 0
    assert set(event.totals.dropped) <= {"ingest:paused", "ingest:stopped", "egress:left"}, event.totals.dropped


async def test_a_lossless_stream_loses_nothing_by_a_pause(media: Bench, tmp_path: Path) -> None:
    media.delay_s = 0.05
    stream = await media.begin(clips.make_clip(tmp_path / "in.mp4", frames=60), credits=2)
    await until(lambda: len(media.chunks) >= 3)
    await pause(media, stream, True)
    count = len(media.chunks)
    await asyncio.sleep(0.4)
    assert len(media.chunks) == count
    resumed = await pause(media, stream, False)
    assert resumed.chunk == count
    event = await media.end()
    assert event.event is EventKind.STOPPED, event.reason
    assert event.totals is not None
    assert event.totals.on_time == event.totals.frames_in == 60
    assert [f.index for c in media.chunks for f in c.stamp.frames] == list(range(60))


async def test_a_paused_stream_can_be_stopped(media: Bench, tmp_path: Path) -> None:
    media.delay_s = 0.05
    stream = await media.begin(clips.make_clip(tmp_path / "in.mp4", frames=60), credits=2)
    await until(lambda: len(media.chunks) >= 2)
    await pause(media, stream, True)
    await media.leave("ingest", stream, drain=True)
    event = await media.end()
    assert event.event is EventKind.STOPPED, event.reason
    assert event.totals is not None
    assert event.totals.closed == event.totals.frames_in > 0


@pytest.mark.parametrize("drain", [True, False])
async def test_a_paused_stream_whose_source_has_ended_can_be_stopped(media: Bench, tmp_path: Path, drain: bool) -> None:
    """What waits for a credit was never numbered: it is dropped, and the ledger closes."""
    media.delay_s = 0.4
    stream = await media.begin(clips.make_clip(tmp_path / "in.mp4", frames=7), credits=1)
    await until(lambda: len(media.chunks) >= 1)
    await asyncio.sleep(0.2)  # the source has been read to its end; its last two frames wait
    await pause(media, stream, True)
    await media.leave("ingest", stream, drain=drain)
    event = await media.end()
    assert event.totals is not None
    assert event.totals.frames_in == event.totals.closed == 7
    assert event.totals.dropped == {"ingest:stopped": 2}


async def test_a_repeated_pause_is_answered_again_and_changes_nothing(media: Bench) -> None:
    stream = await media.begin(PatternSource(), mode=Mode.LIVE, fps=50)
    await until(lambda: len(media.chunks) >= 2)
    first, again = await pause(media, stream, True), await pause(media, stream, True)
    assert first.chunk == again.chunk
    await pause(media, stream, False)
    assert (await pause(media, stream, False)).reason == "resumed"


async def test_an_old_pause_that_is_delivered_again_does_not_pause_the_stream_again(media: Bench) -> None:
    stream = await media.begin(PatternSource(), mode=Mode.LIVE, fps=50)
    await until(lambda: len(media.chunks) >= 2)
    old = PauseStream(instance="ingest-0", stream=stream, epoch=1, command="old", paused=True)
    await media.bus.publish(subjects.assign("ingest"), old)
    await until(lambda: any(event.command == "old" for event in media.events))
    await pause(media, stream, False)
    await media.bus.publish(subjects.assign("ingest"), old)
    await until(lambda: sum(event.command == "old" for event in media.events) == 2)
    first, again = (event for event in media.events if event.command == "old")
    assert (first.chunk, first.pts) == (again.chunk, again.pts)
    count = len(media.chunks)
    await until(lambda: len(media.chunks) >= count + 3)


async def test_more_credits_come_within_an_epoch_and_never_go(media: Bench) -> None:
    media.lose = lambda chunk: True
    source = PatternSource()
    stream = await media.begin(source, credits=2)
    await until(lambda: len(media.chunks) == 2)
    session = await media.store.get(stream)
    assert session is not None
    for credits, chunks in ((6, 6), (2, 6)):
        take = TakeStream(
            instance="ingest-0",
            stream=stream,
            epoch=1,
            spec=session["spec"],
            width=96,
            height=64,
            noise=0.5,
            credits=credits,
        )
        assert await media.take("ingest", take) is None
        await until(lambda: len(media.chunks) >= 6)
        await asyncio.sleep(0.1)
        assert len(media.chunks) == chunks


async def test_without_a_source_chunks_carry_their_stamps_and_no_pixels(media: Bench) -> None:
    await media.begin(NoSource(frames=11), fps=25)
    await until(lambda: len(media.chunks) == 3 and bool(media.ends))
    assert [c.stamp.pixel_frames for c in media.chunks] == [5, 4, 4]
    assert [c.pixels.shape for c in media.chunks] == [(0, 64, 96, 3)] * 3
    assert media.ends[-1].totals.numbered == 11
    assert (
        media.chunks[0].stamp.frames[1].pts * media.chunks[0].stamp.time_base[0] * 25
        == (media.chunks[0].stamp.time_base[1])
    )
