"""Sinks that come and go while a stream runs: real players and servers take what is made, and none disturbs another."""

from __future__ import annotations

import asyncio
import io
import json
import secrets
import shutil
import subprocess
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import av
import pytest
import pytest_asyncio

from shared.bus.port import Received
from shared.contracts import subjects
from shared.contracts.events import EventKind, StreamEvent
from shared.contracts.sinks import (
    AddSink,
    FramePublished,
    HlsSink,
    Looking,
    Mp4Sink,
    NatsSink,
    RemoveSink,
    RtmpSink,
    Sink,
)
from shared.contracts.sources import PatternSource
from shared.embedded import free_port
from tests.support.lab import Lab, Running, frames_of, reconciles
from tests.support.listening import listening

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(240)]
needs_ffmpeg = pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="no ffmpeg: apt-get install ffmpeg")


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def lab(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Lab]:
    async with Lab.start(tmp_path_factory.mktemp("sinks"), env={"RHEOCAST_ALLOWED_HOSTS": "127.0.0.1"}) as lab:
        yield lab


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def running(lab: Lab) -> AsyncIterator[Running]:
    """One live stream that all of these share; a recording from its start shows that nothing disturbed it."""
    running = await lab.begin(PatternSource(), lab.folder / "whole.mp4", mode="live", fps=10, steps=1)
    assert running.accepted, running.events
    yield running


async def add(lab: Lab, running: Running, sink: Sink) -> StreamEvent:
    """Add one; egress' answer."""
    command = secrets.token_hex(8)
    await lab.control(running, AddSink(command=command, stream=running.stream, sink=sink))
    return await answer(running, command)


async def remove(lab: Lab, running: Running, name: str) -> StreamEvent:
    command = secrets.token_hex(8)
    await lab.control(running, RemoveSink(command=command, stream=running.stream, sink=name))
    return await answer(running, command)


async def answer(running: Running, command: str) -> StreamEvent:
    wanted = (EventKind.APPLIED, EventKind.REFUSED, EventKind.WARNING)
    for _ in range(2000):
        found = [event for event in running.events if event.command == command and event.event in wanted]
        if found:
            return found[0]
        await asyncio.sleep(0.01)
    raise AssertionError(f"never answered: {running.events}")


async def probe(where: str | Path) -> dict[str, Any]:
    """What ffprobe reads of it."""
    command = ["ffprobe", "-v", "error", "-show_streams", "-of", "json", str(where)]
    done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["streams"][0]


async def test_a_recording_begins_and_ends_while_the_stream_runs(lab: Lab, running: Running) -> None:
    path = lab.folder / "recordings" / "local" / "later.mp4"
    begun = await add(lab, running, Mp4Sink(id="rec", path=str(path)))
    assert (begun.event, begun.service) == (EventKind.APPLIED, "egress")
    assert begun.chunk >= 0
    await asyncio.sleep(2.0)
    assert not path.exists()
    assert (await remove(lab, running, "rec")).event is EventKind.APPLIED
    frames = frames_of(path)
    assert frames.shape[0] >= 10
    assert frames.shape[1:] == (96, 160, 3)
    again = await remove(lab, running, "rec")
    assert again.event is EventKind.REFUSED
    assert "no sink 'rec'" in again.reason


@needs_ffmpeg
async def test_a_player_takes_hls_while_it_is_made(lab: Lab, running: Running) -> None:
    added = await add(lab, running, HlsSink(id="hls", segment_s=1.0, window=3))
    assert added.event is EventKind.APPLIED
    folder = lab.folder / "hls" / running.stream
    playlist = folder / "index.m3u8"
    for _ in range(600):
        if playlist.exists() and playlist.read_text().count("#EXTINF") >= 3:
            break
        await asyncio.sleep(0.02)
    text = playlist.read_text()
    assert "#EXT-X-INDEPENDENT-SEGMENTS" in text
    assert "#EXT-X-PROGRAM-DATE-TIME" in text
    assert "#EXT-X-ENDLIST" not in text
    seen = await probe(playlist)
    assert (seen["codec_name"], seen["width"], seen["height"]) == ("h264", 160, 96)
    assert (await remove(lab, running, "hls")).event is EventKind.APPLIED
    assert "#EXT-X-ENDLIST" in playlist.read_text()
    assert len(list(folder.glob("*.m4s"))) <= 3 + 3  # old segments are gone


@needs_ffmpeg
async def test_an_rtmp_server_takes_a_push(lab: Lab, running: Running, tmp_path: Path) -> None:
    url = f"rtmp://127.0.0.1:{free_port()}/live/key"
    received = tmp_path / "received.flv"
    command = ["ffmpeg", "-v", "error", "-listen", "1", "-i", url, "-c", "copy", "-t", "2", str(received)]
    server = await asyncio.create_subprocess_exec(*command, stdin=subprocess.DEVNULL)
    await listening(server.pid)
    added = await add(lab, running, RtmpSink(id="push", url=url))
    assert added.event is EventKind.APPLIED, added.reason
    assert await asyncio.wait_for(server.wait(), 30) == 0
    assert (await probe(received))["codec_name"] == "h264"
    # The server has left: told once, tried again, and nobody else is disturbed.
    for _ in range(1000):
        told = [e.reason for e in running.of(EventKind.WARNING) if "push" in e.reason]
        if told:
            break
        await asyncio.sleep(0.01)
    assert "the RTMP server cannot be reached" in told[0]
    assert (await remove(lab, running, "push")).event is EventKind.APPLIED


async def test_a_sink_that_cannot_be_opened_says_so(lab: Lab, running: Running) -> None:
    closed = await add(lab, running, RtmpSink(id="nobody", url=f"rtmp://127.0.0.1:{free_port()}/live/x"))
    assert closed.event is EventKind.WARNING
    assert "check the address" in closed.reason
    inside = await add(lab, running, RtmpSink(id="inside", url="rtmp://10.0.0.1/live/x"))
    assert inside.event is EventKind.WARNING
    assert "private network" in inside.reason
    outside = await add(lab, running, Mp4Sink(id="out", path="/etc/x.mp4"))
    assert outside.event is EventKind.WARNING
    twice = await add(lab, running, NatsSink(id="nobody"))
    assert twice.event is EventKind.REFUSED
    assert "already" in twice.reason
    assert (closed.sink, closed.gone) == ("nobody", False), "it is tried again"
    assert (outside.sink, outside.gone) == ("out", True)
    assert (await remove(lab, running, "nobody")).event is EventKind.APPLIED
    for name in ("inside", "out"):  # their places are free
        assert (await remove(lab, running, name)).event is EventKind.REFUSED
        assert (await add(lab, running, NatsSink(id=name))).event is EventKind.APPLIED
        assert (await remove(lab, running, name)).event is EventKind.APPLIED


async def test_who_looks_gets_pictures_and_nobody_else_costs_anything(lab: Lab, running: Running) -> None:
    got: list[FramePublished] = []

    async def on_out(received: Received) -> None:
        got.append(received.message)

    bus = lab.system.bus
    subscription = await bus.subscribe(subjects.stream(running.stream, "out"), on_out)
    await asyncio.sleep(0.5)
    assert got == []  # nobody looks
    await bus.publish(subjects.stream(running.stream, "looking"), Looking(stream=running.stream, max_fps=30))
    until = time.monotonic() + 15
    while len(got) < 10 and time.monotonic() < until:
        await asyncio.sleep(0.02)
    pictures = {frame.pts for frame in got}
    assert len(got) == len(pictures) >= 10
    with av.open(io.BytesIO(got[0].data)) as container:
        assert next(container.decode(video=0)).width == got[0].width == 160
    assert got[0].captured_ns < got[0].shown_ns
    await subscription.unsubscribe()


async def test_nothing_of_this_disturbed_the_recording_from_the_start(lab: Lab, running: Running) -> None:
    ended = await lab.stop(running)
    assert ended.event is EventKind.STOPPED, ended.reason
    assert reconciles(ended)
    assert ended.totals is not None
    frames = frames_of(lab.folder / "whole.mp4")
    assert frames.shape[0] == ended.totals.on_time + ended.totals.late


async def test_a_stream_changes_its_size_while_it_runs(lab: Lab) -> None:
    """Alone: a busy machine would not let a second one in, nor a larger picture. Smaller ones have room in any case."""
    path = lab.folder / "sized.mp4"
    sinks = (Mp4Sink(id="file", path=str(path)), NatsSink(id="out"))
    running = await lab.begin(PatternSource(), None, mode="live", fps=10, steps=1, sinks=sinks, deadline_ms=1500)
    assert running.accepted, running.events
    got: list[FramePublished] = []

    async def on_out(received: Received) -> None:
        got.append(received.message)

    async def seen(size: tuple[int, int], frames: int = 5) -> list[FramePublished]:
        until = time.monotonic() + 30
        while time.monotonic() < until:
            found = [frame for frame in got if (frame.width, frame.height) == size]
            if len(found) >= frames:
                return found
            await asyncio.sleep(0.02)
        raise AssertionError(f"no pictures of {size}: {[(f.width, f.height) for f in got[-5:]]}, {running.events}")

    subscription = await lab.system.bus.subscribe(subjects.stream(running.stream, "out"), on_out)
    await seen((160, 96))
    changed = await lab.update(running, width=96, height=64)
    assert changed.event is EventKind.APPLIED, changed.reason
    assert min(frame.chunk for frame in await seen((96, 64))) == changed.chunk, (
        "the receipt names the first of that size"
    )
    assert max(frame.chunk for frame in got if frame.width == 160) < changed.chunk
    again = await lab.update(running, width=80, height=48)
    assert again.chunk > changed.chunk, again.reason
    told = [event.reason for event in running.of(EventKind.WARNING) if event.service == "egress"]
    assert told == [f"sink file keeps the size at opening: {size} is fitted into it" for size in ("96×64", "80×48")]
    huge = await lab.update(running, width=2048, height=2048)
    await subscription.unsubscribe()
    ended = await lab.stop(running)
    assert ended.event is EventKind.STOPPED, ended.reason
    assert reconciles(ended), ended.totals
    assert ended.totals is not None
    # Nothing that was numbered is lost: only what came while there was no size for it.
    dropped = {key for key, frames in ended.totals.dropped.items() if frames}
    assert dropped <= {"ingest:resized", "ingest:no_credit", "ingest:stopped", "ingest:behind", "scheduler:stale"}, (
        dropped
    )
    frames = frames_of(path)
    assert frames.shape[1:] == (96, 160, 3), "the file keeps its size"
    assert huge.event is EventKind.REFUSED
    assert "the stream goes on at 80×48" in huge.reason
    assert huge.retry_after_s > 0, "not now: the API answers 503 with Retry-After"
