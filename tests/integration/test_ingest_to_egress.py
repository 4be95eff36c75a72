"""A clip through ingest and egress, with an echo in place of the pipeline: what goes in comes out, on time and counted."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import pytest_asyncio

from services.egress.codec import H264Track
from services.egress.sinks.port import OutFrame
from services.ingest.sources.pattern import read_index
from shared.contracts import subjects
from shared.contracts.commands import LeaveStream, Mode, PatternSource, TakeStream
from shared.contracts.events import EventKind
from shared.session.memory import MemoryStore
from shared.session.port import StoreUnavailableError
from shared.session.state import StreamState
from tests.support import clips
from tests.support.media_bench import Bench, RefusedError, bench


@pytest_asyncio.fixture
async def media(tmp_path: Path, run_id: str) -> AsyncIterator[Bench]:
    async with bench(tmp_path, run_id, loss_timeout_s=0.5, stall_s=5.0) as running:
        yield running


def pictures(path: Path) -> list[np.ndarray]:
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


async def test_a_lossless_file_comes_out_whole_with_its_own_timestamps(media: Bench, tmp_path: Path) -> None:
    source = clips.make_vfr_clip(tmp_path / "in.mp4", frames=22, audio=clips.Audio(seconds=1.2))
    output = tmp_path / "out.mp4"
    event = await media.run(source, output)
    assert event.event is EventKind.STOPPED, event.reason
    assert event.totals is not None
    assert event.totals.frames_in == event.totals.on_time == 22
    assert clips.timestamps(output) == clips.timestamps(source)
    for a, b in zip(pictures(source), pictures(output), strict=True):
        assert np.abs(a.astype(int) - b).mean() < 6
    assert clips.boxes(output)[:2] == ["ftyp", "moov"], "the index stands in front"
    assert not list(tmp_path.glob("*.part*"))


async def test_the_chunks_are_five_then_four_and_the_last_is_padded(media: Bench, tmp_path: Path) -> None:
    await media.run(clips.make_clip(tmp_path / "in.mp4", frames=11))
    sizes = [(len(c.stamp.frames), c.stamp.padding, c.pixels.shape[0], len(c.rmse)) for c in media.chunks]
    assert sizes == [(5, 0, 5, 5), (4, 0, 4, 4), (2, 2, 4, 4)]
    assert [f.index for c in media.chunks for f in c.stamp.frames] == list(range(11))
    assert media.chunks[0].rmse[0] == 0
    assert all(value > 0 for chunk in media.chunks[:2] for value in chunk.rmse[1:])
    assert media.ends[-1].totals.numbered == 11


async def test_the_ledger_in_the_store_agrees_with_what_is_told(media: Bench, tmp_path: Path) -> None:
    stream = await media.begin(clips.make_clip(tmp_path / "in.mp4", frames=14), tmp_path / "out.mp4")
    event = await media.end()
    totals, closed, through = await media.store.ledger(stream)
    assert totals == event.totals
    assert closed == through == 4
    session = await media.store.get(stream)
    assert session is not None
    assert session["state"] is StreamState.STOPPED
    assert media.closed[-1].totals == event.totals


@pytest.mark.parametrize("codec", ["aac", "libmp3lame", "ac3", "alac", "flac", "libopus", "pcm_s16le"])
async def test_sound_stays_where_it_was(media: Bench, tmp_path: Path, codec: str) -> None:
    suffix = ".mkv" if codec in ("flac", "libopus", "pcm_s16le") else ".mp4"
    sound = clips.Audio(codec, seconds=0.8, offset_s=0.2)
    source = clips.make_clip(tmp_path / f"in{suffix}", frames=16, audio=sound)
    output = tmp_path / "out.mp4"
    await media.run(source, output)
    before, after = clips.timestamps(source, "audio"), clips.timestamps(output, "audio")
    assert abs(float(clips.sound_begins(output)) - float(clips.sound_begins(source))) < 0.04
    assert abs(float(after[-1] - before[-1])) < 0.1
    with av.open(str(output)) as container:
        expected = "aac" if codec == "pcm_s16le" else clips.decoder_name(source)
        assert container.streams.audio[0].codec_context.name == expected


async def test_sound_of_a_transport_stream_is_passed_on(media: Bench, tmp_path: Path) -> None:
    source = clips.make_clip(tmp_path / "in.ts", frames=16, audio=True)
    output = tmp_path / "out.mp4"
    await media.run(source, output)
    assert abs(float(clips.sound_begins(output)) - float(clips.sound_begins(source))) < 0.04


async def test_a_live_stream_is_paced_and_every_frame_has_a_verdict(media: Bench, tmp_path: Path) -> None:
    media.delay_s = 0.05
    output = tmp_path / "out.mp4"
    event = await media.run(PatternSource(frames=21), output, mode=Mode.LIVE, fps=25, size=(160, 96), credits=8)
    assert event.event is EventKind.STOPPED, event.reason
    totals = event.totals
    assert totals is not None
    assert totals.frames_in == totals.closed == 21
    assert totals.on_time >= 17, "an idle machine keeps a 600 ms deadline"
    assert [read_index(picture) for picture in pictures(output)] == list(range(21))[-len(pictures(output)) :]
    assert event.stats is not None
    assert 20 < event.stats.fps < 30


async def test_a_live_stream_without_credit_drops_the_oldest_and_counts_it(media: Bench) -> None:
    media.delay_s = 0.4
    event = await media.run(PatternSource(frames=60), mode=Mode.LIVE, fps=50, credits=1, deadline_ms=1000)
    totals = event.totals
    assert totals is not None
    assert totals.frames_in == totals.closed == 60
    assert totals.dropped["ingest:no_credit"] > 20
    numbered = [frame.index for chunk in media.chunks for frame in chunk.stamp.frames]
    assert numbered == sorted(set(numbered))
    assert numbered[:5] == [0, 1, 2, 3, 4]


async def test_a_chunk_lost_on_the_way_is_lost_in_the_ledger_of_a_live_stream(tmp_path: Path, run_id: str) -> None:
    async with bench(tmp_path, run_id, lost_after_s=0.2) as media:
        media.lose = lambda chunk: chunk.stamp.chunk == 2
        event = await media.run(PatternSource(frames=29), mode=Mode.LIVE, fps=50, deadline_ms=400, credits=16)
        totals = event.totals
        assert totals is not None
        assert totals.frames_in == totals.closed == 29
        assert totals.dropped == {"egress:lost": 4}


async def test_a_loss_fails_a_lossless_run_loudly_and_keeps_what_came_before(media: Bench, tmp_path: Path) -> None:
    media.lose = lambda chunk: chunk.stamp.chunk == 3
    output = tmp_path / "out.mp4"
    event = await media.run(clips.make_clip(tmp_path / "in.mp4", frames=30), output)
    assert event.event is EventKind.FAILED
    assert "chunk 3" in event.reason
    assert len(pictures(output)) == 13
    totals = event.totals
    assert totals is not None
    assert totals.closed == totals.frames_in
    assert totals.on_time == 13


async def test_a_pipeline_that_stands_still_is_noticed_by_ingest(tmp_path: Path, run_id: str) -> None:
    async with bench(tmp_path, run_id, stall_s=0.6, loss_timeout_s=30) as media:
        media.lose = lambda chunk: True
        stream = await media.begin(clips.make_clip(tmp_path / "in.mp4", frames=30), credits=2)
        while not any(e.service == "ingest" and e.event is EventKind.FAILED for e in media.events):
            await asyncio.sleep(0.05)
        assert len(media.chunks) == 2, "back-pressure: no credit, no chunk"
        reason = next(e.reason for e in media.events if e.service == "ingest")
        assert "no verdict for chunk 0" in reason
        await media.leave("egress", stream, failure=reason)
        event = await media.end()
        assert event.event is EventKind.FAILED
        assert event.totals is not None
        assert event.totals.closed == event.totals.frames_in


async def test_a_file_that_breaks_off_is_delivered_as_far_as_it_goes(media: Bench, tmp_path: Path) -> None:
    source = clips.make_cut_clip(tmp_path / "in.mp4", frames=40)
    output = tmp_path / "out.mp4"
    event = await media.run(source, output)
    assert event.event is EventKind.STOPPED
    assert "breaks off" in event.reason
    assert any(e.event is EventKind.WARNING and "breaks off" in e.reason for e in media.events)
    totals = event.totals
    assert totals is not None
    assert 10 < totals.frames_in == totals.on_time == len(pictures(output)) < 40


@pytest.mark.parametrize("frames", [1, 3, 5, 6])
async def test_short_clips(media: Bench, tmp_path: Path, frames: int) -> None:
    event = await media.run(clips.make_clip(tmp_path / "in.mp4", frames=frames), tmp_path / "out.mp4")
    assert event.totals is not None
    assert event.totals.on_time == frames
    assert len(pictures(tmp_path / "out.mp4")) == frames


async def test_constant_rate_keeps_the_first_timestamp(media: Bench, tmp_path: Path) -> None:
    source = clips.make_vfr_clip(tmp_path / "in.mp4", frames=16)
    output = tmp_path / "out.mp4"
    await media.run(source, output, fps=12)
    times = clips.timestamps(output)
    assert times[0] == clips.timestamps(source)[0]
    assert {b - a for a, b in zip(times, times[1:], strict=False)} == {Fraction(1, 12)}


async def test_what_a_stopped_stream_had_is_in_the_file(media: Bench, tmp_path: Path) -> None:
    output = tmp_path / "out.mp4"
    stream = await media.begin(PatternSource(), output, mode=Mode.LIVE, fps=30, credits=8)
    await asyncio.sleep(1.2)
    await media.leave("ingest", stream)
    await asyncio.sleep(0.3)
    await media.leave("egress", stream)
    event = await media.end()
    assert event.event is EventKind.STOPPED
    totals = event.totals
    assert totals is not None
    assert totals.closed == totals.frames_in
    assert event.stats is not None
    assert len(pictures(output)) == event.stats.frames_out > 5


async def test_a_restarted_egress_closes_the_stream_that_its_predecessor_played(media: Bench, tmp_path: Path) -> None:
    output = tmp_path / "out.mp4"
    stream = await media.begin(PatternSource(), output, mode=Mode.LIVE, fps=30, credits=8)
    await asyncio.sleep(1.6)
    # The process is killed: its file is left as it is, and nobody hears of it.
    dead = media.egress
    for playing in dead._streams.values():
        for task in (playing._task, playing._bookkeeper):
            assert task is not None
            task.cancel()
    assert dead._assign is not None
    await dead._assign.unsubscribe()
    media.egress = media.new_egress()
    await media.egress.start()
    await media.leave("ingest", stream, failure="egress-0 was restarted")
    await media.leave("egress", stream, failure="egress-0 was restarted")
    event = await media.end()
    assert event.event is EventKind.FAILED
    totals = event.totals
    assert totals is not None
    assert totals.closed == totals.frames_in > 20
    assert totals.on_time > 10, "what the predecessor had closed stays closed"
    assert len(pictures(output)) > 10, "what it had recorded is kept"
    dead._streams.clear()


@pytest.mark.parametrize(
    ("source", "output", "words"),
    [
        ("missing.mp4", "out.mp4", "no such file"),
        ("in.mp4", "no/such/out.mp4", "folder does not exist"),
        ("/etc/hostname", "out.mp4", "outside the folders"),
        ("in.mp4", "/etc/out.mp4", "outside the folders"),
        ("link.mp4", "out.mp4", "outside the folders"),
    ],
)
async def test_what_cannot_be_opened_is_refused_with_one_line(
    media: Bench, tmp_path: Path, source: str, output: str, words: str
) -> None:
    clips.make_clip(tmp_path / "in.mp4", frames=5)
    (tmp_path / "link.mp4").symlink_to("/etc/hostname")
    with pytest.raises(RefusedError, match=words) as error:
        await media.begin(tmp_path / source, tmp_path / output)
    assert "\n" not in str(error.value)


async def test_a_bad_bus_loses_nothing_from_the_ledger_of_a_live_stream(tmp_path: Path, run_id: str) -> None:
    faults = "drop=0.05,duplicate=0.05,delay=0.05,seed=3"
    async with bench(tmp_path, run_id, lost_after_s=0.4, faults=faults) as media:
        event = await media.run(PatternSource(frames=81), mode=Mode.LIVE, fps=50, deadline_ms=500, credits=16)
        totals = event.totals
        assert totals is not None
        assert totals.frames_in == totals.closed == 81


async def test_a_service_that_is_shut_down_finishes_its_files(media: Bench, tmp_path: Path) -> None:
    output = tmp_path / "out.mp4"
    await media.begin(PatternSource(), output, mode=Mode.LIVE, fps=30, credits=8)
    await asyncio.sleep(1.0)
    media.egress.refuse()
    await asyncio.wait_for(media.egress.idle.wait(), 5)
    event = await media.end()
    assert event.event is EventKind.FAILED
    assert "shut down" in event.reason
    assert event.totals is not None
    assert event.totals.closed == event.totals.frames_in
    assert len(pictures(output)) > 5
    with pytest.raises(RefusedError, match="shutting down"):
        await media.begin(PatternSource(frames=5))


async def test_an_ingest_that_is_shut_down_ends_its_streams_in_order(media: Bench, tmp_path: Path) -> None:
    await media.begin(PatternSource(), tmp_path / "out.mp4", mode=Mode.LIVE, fps=30, credits=8)
    await asyncio.sleep(0.8)
    media.ingest.refuse()
    event = await media.end()
    assert event.event is EventKind.STOPPED, event.reason
    assert event.totals is not None
    assert event.totals.closed == event.totals.frames_in
    assert len(pictures(tmp_path / "out.mp4")) == event.totals.on_time + event.totals.late


async def test_repeated_and_old_assignments_change_nothing(media: Bench) -> None:
    stream = await media.begin(PatternSource(), mode=Mode.LIVE, fps=30, credits=8)
    session = await media.store.get(stream)
    assert session is not None

    def take(service: str, epoch: int) -> TakeStream:
        return TakeStream(
            instance=f"{service}-0",
            stream=stream,
            epoch=epoch,
            spec=session["spec"],
            width=96,
            height=64,
            noise=0.5,
            credits=8,
        )

    await asyncio.sleep(0.4)
    for service in ("egress", "ingest"):
        assert await media.take(service, take(service, 1)) is None, "answered again, opened once"
        assert await media.take(service, take(service, 2)) is None
        await media.bus.publish(subjects.assign(service), take(service, 1))
    await asyncio.sleep(0.5)
    assert media.ingest.counters == {"take_old_epoch": 1}
    assert media.egress.counters["take_old_epoch"] == 1
    assert [chunk.stamp.chunk for chunk in media.chunks] == list(range(len(media.chunks)))
    assert {chunk.stamp.epoch for chunk in media.chunks} == {1, 2}
    await media.bus.publish(
        subjects.assign("ingest"), LeaveStream(instance="ingest-0", stream=stream, epoch=2, drain=True)
    )
    event = await media.end()
    assert event.event is EventKind.STOPPED
    assert event.totals is not None
    assert event.totals.closed == event.totals.frames_in


async def test_two_streams_do_not_write_one_file(media: Bench, tmp_path: Path) -> None:
    await media.begin(PatternSource(), tmp_path / "out.mp4", mode=Mode.LIVE)
    with pytest.raises(RefusedError, match="another stream is writing it"):
        await media.begin(PatternSource(), tmp_path / "out.mp4", mode=Mode.LIVE)


async def test_an_opaque_disk_error_fails_the_stream_with_one_line(
    media: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: H264Track, frame: OutFrame) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(H264Track, "write", full)
    event = await media.run(clips.make_clip(tmp_path / "in.mp4", frames=20), tmp_path / "out.mp4")
    assert event.event is EventKind.FAILED
    assert "No space left" in event.reason
    assert event.totals is not None
    assert event.totals.closed == event.totals.frames_in


class _AwayStore(MemoryStore):
    """A session store that does not answer while ``away``; ``lost_answers`` are carried out and not acknowledged."""

    away = False
    lost_answers = 0

    async def close_chunk(self, stream: str, chunk: int, verdict: dict[str, int]) -> bool:
        if self.away:
            raise StoreUnavailableError("the store does not answer")
        first = await super().close_chunk(stream, chunk, verdict)
        if self.lost_answers:
            self.lost_answers -= 1
            raise StoreUnavailableError("the answer got lost")
        return first


async def test_a_store_that_is_away_for_a_while_holds_up_nothing_and_gets_every_verdict(
    tmp_path: Path, run_id: str
) -> None:
    store = _AwayStore()
    async with bench(tmp_path, run_id, store=store, repeat_s=0.2) as media:
        stream = await media.begin(PatternSource(frames=45), mode=Mode.LIVE, fps=30, credits=4)
        store.away = True
        await asyncio.sleep(0.7)
        store.away, store.lost_answers = False, 2
        event = await media.end()
        totals, _, through = await store.ledger(stream)
        assert totals == event.totals
        assert totals.frames_in == totals.closed == 45
        assert totals.on_time > 40
        assert through == 11


async def test_a_steadied_stream_flickers_less_and_any_other_is_as_it_was_made(media: Bench, tmp_path: Path) -> None:
    """What the echo gives flickers. Ingest tells how its source moves, and egress steadies along it, for every sink."""
    source, rng = clips.make_clip(tmp_path / "in.mp4", frames=21), np.random.default_rng(0)
    noise = {chunk: rng.integers(-20, 21, (5, 8, 12, 3)) for chunk in range(6)}

    def flicker(chunk: int, pixels: np.ndarray) -> np.ndarray:
        coarse = noise[chunk][: len(pixels)].repeat(8, 1).repeat(8, 2)
        return np.clip(pixels.astype(int) + coarse, 0, 255).astype(np.uint8)

    media.change = flicker
    errors: dict[float, float] = {}
    for steadying in (0.0, 0.5):
        media.chunks.clear()
        media.ended.clear()
        output = tmp_path / f"out-{steadying}.mp4"
        event = await media.run(source, output, steadying=steadying)
        assert event.event is EventKind.STOPPED, event.reason
        assert [len(chunk.flow) for chunk in media.chunks] == [
            3 * 96 * len(c.rmse) * bool(steadying) for c in media.chunks
        ]
        both = zip(pictures(source), pictures(output), strict=True)
        errors[steadying] = float(np.mean([np.square(a.astype(float) - b).mean() for a, b in list(both)[3:]]))
    assert errors[0.5] < 0.75 * errors[0.0]
