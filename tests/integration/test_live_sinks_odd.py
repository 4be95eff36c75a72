"""Live sinks with odd names, addresses and encoders; and their sound, which is captured long before its pictures."""

from __future__ import annotations

import asyncio
import secrets
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import pytest

from shared.bus.port import Received
from shared.contracts import subjects
from shared.contracts.commands import Mode, TakeStream
from shared.contracts.events import EventKind, StreamEvent
from shared.contracts.sinks import (
    ChangeSinks,
    HlsSink,
    Looking,
    Mp4Sink,
    NullSink,
    RtmpSink,
    Sink,
    SinkState,
    named,
)
from shared.contracts.sources import PatternSource
from shared.embedded import free_port
from tests.support import clips
from tests.support.listening import listening
from tests.support.media_bench import Bench, RefusedError, bench


@asynccontextmanager
async def playing(folder: Path, run_id: str, *sinks: Sink, **settings: Any) -> AsyncIterator[tuple[Bench, str]]:
    """A live test pattern with these sinks from its start; it is ended, and must have ended well."""
    async with bench(folder, run_id, **settings) as media:
        stream = await media.begin(PatternSource(), sinks=sinks, mode=Mode.LIVE, fps=10)
        yield media, stream
        await media.leave("ingest", stream)
        await media.leave("egress", stream)
        assert (await media.end()).event is EventKind.STOPPED


async def change(media: Bench, stream: str, add: Sink | None = None, remove: str = "") -> StreamEvent:
    """What egress answers."""
    command = secrets.token_hex(8)
    message = ChangeSinks(instance="egress-0", stream=stream, epoch=1, command=command, add=add, remove=remove)
    await media.bus.publish(subjects.assign("egress"), message)
    async with asyncio.timeout(20):
        while True:
            if answers := [event for event in media.events if event.command == command]:
                return answers[0]
            await asyncio.sleep(0.01)


async def until(condition: Any) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


def times_of(path: Path) -> dict[str, list[float]]:
    """When each track's packets are shown, in seconds."""
    found: dict[str, list[float]] = {}
    with av.open(str(path)) as container:
        for packet in container.demux():
            if packet.pts is not None:
                found.setdefault(packet.stream.type, []).append(float(packet.pts * packet.time_base))
    return found


async def test_no_id_of_a_sink_means_anything_inside(tmp_path: Path, run_id: str) -> None:
    async with playing(tmp_path, run_id, Mp4Sink(id="live", path="whole.mp4")) as (media, stream):
        assert (await change(media, stream, HlsSink(id="hls", segment_s=0.4))).event is EventKind.APPLIED
        assert (await change(media, stream, remove="live")).event is EventKind.APPLIED
        assert times_of(tmp_path / "whole.mp4")["video"]
        folder = tmp_path / "hls" / stream
        seen = len(list(folder.glob("*.m4s")))
        await until(lambda: len(list(folder.glob("*.m4s"))) >= seen + 2)  # it goes on


async def test_two_sinks_of_one_id_are_refused(tmp_path: Path, run_id: str) -> None:
    async with bench(tmp_path, run_id) as media:
        sinks = (Mp4Sink(id="mp4-2", path="a.mp4"), Mp4Sink(path="b.mp4"))
        with pytest.raises(RefusedError, match="two sinks have the id mp4-2: give each"):
            await media.begin(PatternSource(), sinks=sinks, mode=Mode.LIVE, fps=10)
    assert not list(tmp_path.glob("*.mp4"))


async def test_a_bad_address_at_the_start_is_told_and_costs_nobody_else(tmp_path: Path, run_id: str) -> None:
    pictures: list[Any] = []

    async def on_out(received: Received) -> None:
        pictures.append(received.message)

    bad = RtmpSink(id="push", url="rtmp://10.0.0.1/live/key")
    async with playing(tmp_path, run_id, bad, HlsSink(id="hls")) as (media, stream):
        await media.bus.subscribe(subjects.stream(stream, "out"), on_out)
        await media.bus.publish(subjects.stream(stream, "looking"), Looking(stream=stream))
        await until(lambda: pictures and (tmp_path / "hls" / stream).exists())
        (told,) = [event.reason for event in media.events if event.event is EventKind.WARNING]
        assert "sink push" in told
        assert "private network" in told


async def test_an_encoder_that_this_machine_has_not_is_replaced(tmp_path: Path, run_id: str) -> None:
    async with playing(tmp_path, run_id, NullSink(), h264_encoder="h264_nothing") as (media, stream):
        assert (await change(media, stream, Mp4Sink(id="rec", path="rec.mp4"))).event is EventKind.APPLIED
        assert (await change(media, stream, remove="rec")).event is EventKind.APPLIED
        assert times_of(tmp_path / "rec.mp4")["video"]


async def test_a_recording_that_begins_later_has_its_sound_from_its_first_picture(tmp_path: Path, run_id: str) -> None:
    source = clips.make_clip(tmp_path / "in.mp4", frames=48, audio=clips.Audio("aac", seconds=3.0))
    async with bench(tmp_path, run_id) as media:
        stream = await media.begin(source, sinks=(NullSink(),), mode=Mode.LIVE, latency_ms=3000)
        media.delay_s = 0.5  # sound is half a second and more ahead of its pictures
        await media.wait_for_chunk()
        added = await change(media, stream, Mp4Sink(id="rec", path="rec.mp4"))
        assert added.event is EventKind.APPLIED, added.reason
        assert (await media.end()).event is EventKind.STOPPED
    times = times_of(tmp_path / "rec.mp4")
    assert abs(times["audio"][0] - times["video"][0]) <= 0.08
    gaps = [b - a for a, b in zip(times["audio"], times["audio"][1:], strict=False)]
    assert max(gaps) <= 0.08, "no hole in it"


async def test_an_egress_that_comes_back_opens_what_was_added_and_the_recording_goes_on(
    tmp_path: Path, run_id: str
) -> None:
    async with bench(tmp_path, run_id) as media:
        stream = await media.begin(PatternSource(), sinks=(NullSink(),), mode=Mode.LIVE, fps=20, latency_ms=400)
        rec, hls = Mp4Sink(id="rec", path="rec.mp4"), HlsSink(id="hls", segment_s=0.4)
        for sink in (rec, hls):
            assert (await change(media, stream, sink)).event is EventKind.APPLIED
        await until(lambda: media.closed and any(told.frames > 30 for told in media.closed[-1].sinks or ()))
        figures = {told.id: told for told in next(c.sinks for c in reversed(media.closed) if c.sinks)}
        assert {name: told.sink_kind for name, told in figures.items()} == {
            "null-1": "null",
            "rec": "mp4",
            "hls": "hls",
        }
        assert figures["rec"].state is SinkState.LIVE
        assert figures["rec"].bytes > 1000
        # The process is killed: its files are left as they are, and nobody hears of it.
        dead = media.egress
        for playing in dead._streams.values():
            for task in (playing._task, playing._bookkeeper):
                assert task is not None
                task.cancel()
        assert dead._assign is not None
        await dead._assign.unsubscribe()
        for subscription in dead._subscriptions.pop(stream):
            await subscription.unsubscribe()
        written = len(times_of(tmp_path / "rec.part.mp4")["video"])
        media.egress = media.new_egress()
        await media.egress.start()
        session = await media.store.get(stream)
        assert session is not None
        spec = session["spec"].model_copy(update={"sinks": (*named(session["spec"].sinks), rec, hls)})
        take = TakeStream(
            instance="ingest-0", stream=stream, epoch=2, spec=spec, width=96, height=64, noise=0.5, credits=6
        )
        assert await media.take("ingest", take.model_copy(update={"source_held": True})) is None
        again = {"instance": "egress-0", "given_up": "recovering", "added_sinks": ("rec", "hls")}
        assert await media.take("egress", take.model_copy(update=again)) is None
        assert await media.take("ingest", take.model_copy(update={"epoch": 3})) is None
        seen = len(media.closed)
        await until(lambda: any(told.frames > 20 for c in media.closed[seen:] for told in c.sinks or ()))
        for service in ("ingest", "egress"):
            await media.leave(service, stream, epoch=3)
        event = await media.end()
        dead._streams.clear()
    assert event.event is EventKind.STOPPED, event.reason
    assert event.totals is not None
    assert event.totals.closed == event.totals.frames_in > 50
    times = times_of(tmp_path / "rec.mp4")["video"]
    assert len(times) > written + 15, "both parts of it are there"
    assert max(b - a for a, b in pairwise(times)) < 0.5, "one after the other"


MAX_OFFSET_S = 0.08
MOMENTS = (0.8, 1.8, 2.8)


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="no ffmpeg: apt-get install ffmpeg")
async def test_a_flash_and_its_beep_stay_together_whatever_they_go_through(tmp_path: Path, run_id: str) -> None:
    """Measured by what is in the files and what a server got: lip sync, with pictures half a second behind their sound."""
    audio = clips.Audio("aac", seconds=3.6, beeps=MOMENTS)
    source = clips.make_clip(tmp_path / "in.mp4", frames=90, fps=25, audio=audio, flashes=MOMENTS)
    assert max(map(abs, clips.lip_sync(source))) < 0.04, "the clip itself"
    url, pushed = f"rtmp://127.0.0.1:{free_port()}/live/key", tmp_path / "pushed.flv"
    command = ["ffmpeg", "-v", "error", "-listen", "1", "-i", url, "-c", "copy", str(pushed)]
    server = await asyncio.create_subprocess_exec(*command, stdin=asyncio.subprocess.DEVNULL)
    await listening(server.pid)
    async with bench(tmp_path, run_id, latency_ms=3000, allowed_hosts="127.0.0.1") as media:
        media.delay_s = 0.5
        whole = tmp_path / "whole.mp4"
        stream = await media.begin(source, whole, mode=Mode.LIVE, deadline_ms=3000, credits=40)
        hls = HlsSink(id="hls", segment_s=1.0, window=20)
        for sink in (Mp4Sink(id="rec", path="rec.mp4"), hls, RtmpSink(id="push", url=url)):
            added = await change(media, stream, sink)
            assert added.event is EventKind.APPLIED, added.reason
        assert (await media.end()).event is EventKind.STOPPED
        played = tmp_path / "hls" / stream / "index.m3u8"
        await asyncio.wait_for(server.wait(), 20)
        for made in (whole, tmp_path / "rec.mp4", played, pushed):
            offsets = clips.lip_sync(made)
            assert len(offsets) >= 2, f"{made.name}: {offsets}"
            assert max(map(abs, offsets)) <= MAX_OFFSET_S, f"{made.name}: {offsets}"


@pytest.mark.parametrize(("codec", "in_hls"), [("libmp3lame", True), ("eac3", False)])
async def test_sound_that_a_container_can_hold_is_in_it(tmp_path: Path, run_id: str, codec: str, in_hls: bool) -> None:
    """Decoders call themselves otherwise than their codec: mp3float."""
    source = clips.make_clip(tmp_path / "in.mp4", frames=40, fps=20, audio=clips.Audio(codec, seconds=2.0))
    async with bench(tmp_path, run_id, latency_ms=3000) as media:
        media.delay_s = 0.3
        stream = await media.begin(source, mode=Mode.LIVE, deadline_ms=3000, credits=40)
        for sink in (Mp4Sink(id="rec", path="rec.mp4"), HlsSink(id="hls", segment_s=0.5, window=20)):
            added = await change(media, stream, sink)
            assert added.event is EventKind.APPLIED, added.reason
        assert (await media.end()).event is EventKind.STOPPED
    assert len(times_of(tmp_path / "rec.mp4")["audio"]) > 20
    assert ("audio" in times_of(tmp_path / "hls" / stream / "index.m3u8")) is in_hls
