"""Pushes by RTMP: who is let in, and whose a port is."""

from __future__ import annotations

import asyncio
import io
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress

import pytest

from services.ingest.feed import Feed
from services.ingest.links import Links
from services.ingest.reader import Item
from services.ingest.sources.listening import RtmpListenSource
from services.ingest.sources.port import Picture, Sound, SourceError
from shared.bus.memory import MemoryBus
from shared.contracts.commands import Fit
from shared.contracts.events import EventKind
from shared.media.addresses import AddressRules
from shared.media.rtmp import amf
from shared.media.rtmp.messages import HANDSHAKE, Kind, Messages

FFMPEG = shutil.which("ffmpeg")
needs_ffmpeg = pytest.mark.skipif(FFMPEG is None, reason="needs ffmpeg: apt-get install ffmpeg")


class Told(Links):
    """Links whose events are kept for the test."""

    def __init__(self) -> None:
        self.feed: Feed[Item] = Feed(asyncio.get_running_loop(), asyncio.Event(), 8)
        super().__init__("s", lambda: 1, MemoryBus(), self.feed, AddressRules())
        self.events: list[tuple[EventKind, str]] = []

    def tell(self, kind: EventKind, reason: str) -> None:
        self.events.append((kind, reason))


def _ports(count: int) -> tuple[int, int]:
    """So many free ones in a row."""
    for first in range(21_000, 30_000, 16):
        with suppress(OSError):
            for port in range(first, first + count):
                with closing(socket.socket()) as one:
                    one.bind(("127.0.0.1", port))
            return first, first + count - 1
    raise AssertionError("no free ports")


def _source(ports: tuple[int, int], links: Links, fps: float | None = None) -> RtmpListenSource:
    return RtmpListenSource("127.0.0.1", ports, "secret", 10.0, 96, 64, Fit.CROP, fps, True, links)


def _port_of(source: RtmpListenSource) -> int:
    return int(source._url.split(":")[2].partition("/")[0])


@contextmanager
def _pushes(port: int, path: str, seconds: float = 30, *, sound: bool = False) -> Iterator[subprocess.Popen[bytes]]:
    heard = ["-f", "lavfi", "-i", f"sine=440:duration={seconds}", "-c:a", "aac"] if sound else []
    drawn = ["-re", "-f", "lavfi", "-i", f"testsrc=size=160x120:rate=15:duration={seconds}"]
    video = ["-c:v", "libx264", "-preset", "ultrafast", "-tune", "zerolatency", "-g", "15", "-pix_fmt", "yuv420p"]
    arguments = [*drawn, *heard[:4], *video, *heard[4:], "-f", "flv", f"rtmp://127.0.0.1:{port}/{path}"]
    pushes = subprocess.Popen([FFMPEG or "ffmpeg", "-loglevel", "quiet", "-nostdin", *arguments])
    try:
        yield pushes
    finally:
        pushes.kill()
        pushes.wait(5)


@contextmanager
def _reads(source: RtmpListenSource) -> Iterator[list[Picture | Sound]]:
    """What it gives meanwhile, read in a thread."""
    items: list[Picture | Sound] = []

    def read() -> None:
        with suppress(SourceError):
            for item in source.read():
                items.append(item)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    try:
        yield items
    finally:
        source._links._feed.stop()
        thread.join(10)
        source.close()
        assert not thread.is_alive()


async def _until(is_so: Callable[[], bool], seconds: float = 15) -> None:
    for _ in range(int(seconds * 50)):
        if is_so():
            return
        await asyncio.sleep(0.02)
    raise AssertionError("it did not come to that")


@needs_ffmpeg
@pytest.mark.parametrize("path", ["live/wrongkey", "live/secret2", "other/secret"])
async def test_another_key_or_application_is_turned_away_and_the_right_one_let_in(path: str) -> None:
    links = Told()
    source = _source(_ports(1), links)
    with _reads(source) as items:
        with _pushes(_port_of(source), path) as stranger:
            await _until(lambda: stranger.poll() is not None)
        assert items == []
        assert [kind for kind, _ in links.events] == [EventKind.LISTENING]
        with _pushes(_port_of(source), "live/secret", sound=True):
            await _until(lambda: sum(isinstance(item, Picture) for item in items) > 15)
            assert source.audio is not None
            await _until(lambda: any(isinstance(item, Sound) for item in items))
    pictures = [item for item in items if isinstance(item, Picture)]
    assert all(picture.pixels.shape == (64, 96, 3) for picture in pictures)
    assert pictures[0].pixels.std() > 20, "a test picture, not grey"
    assert all(a.pts < b.pts for a, b in zip(pictures, pictures[1:], strict=False))


@needs_ffmpeg
async def test_one_who_breaks_off_comes_back_to_the_same_port() -> None:
    links = Told()
    source = _source(_ports(1), links)
    with _reads(source) as items:
        with _pushes(_port_of(source), "live/secret"):
            await _until(lambda: len(items) > 5)
        await _until(lambda: links.events[-1][0] is EventKind.SOURCE_LOST)
        before = len(items)
        with _pushes(_port_of(source), "live/secret"):
            await _until(lambda: len(items) > before + 5)
    told = [kind for kind, _ in links.events]
    assert told[:4] == [EventKind.LISTENING, EventKind.SOURCE_BACK, EventKind.SOURCE_LOST, EventKind.SOURCE_BACK]


@needs_ffmpeg
async def test_a_port_is_one_streams_even_while_somebody_pushes_to_it() -> None:
    links, ports = Told(), _ports(2)
    first = _source(ports, links)
    with _reads(first) as items, _pushes(_port_of(first), "live/secret"):
        await _until(lambda: len(items) > 3)
        second = _source(ports, Told())
        assert {_port_of(first), _port_of(second)} == set(ports)
        with pytest.raises(SourceError, match="are taken"):
            _source(ports, Told())
        second.close()
        third = _source(ports, Told())
        third.close()
        assert _port_of(third) == _port_of(second)


async def test_a_port_is_given_back_when_opening_fails() -> None:
    ports = _ports(1)
    with pytest.raises((ValueError, OverflowError)):
        _source(ports, Told(), fps=float("inf"))
    _source(ports, Told()).close()
    _source(ports, Told()).close()


async def test_nobody_gets_in_without_having_said_the_key() -> None:
    links = Told()
    source = _source(_ports(1), links)
    with _reads(source) as items:
        for lines in (
            [amf.encode("onStatus", 0, None, {"code": "NetStream.Play.Start"})],
            [amf.encode("publish", 1, None, "secret", "live")],
            [amf.encode("connect", 1, {"app": "live"}), amf.encode("publish", 2, None)],
            [amf.encode("connect", 1, {"app": "live"}), amf.encode("play", 2, None, "secret")],
        ):
            await asyncio.to_thread(_is_hung_up_on, _port_of(source), lines)
        await asyncio.to_thread(_is_hung_up_on, _port_of(source), None)
    assert items == []
    assert [kind for kind, _ in links.events] == [EventKind.LISTENING]


def _is_hung_up_on(port: int, commands: list[bytes] | None) -> None:
    """Within its time, even if it sends a picture, or (None) a byte now and then."""
    began = time.monotonic()
    with closing(socket.create_connection(("127.0.0.1", port), 10)) as sock, suppress(OSError):
        if commands is None:
            while time.monotonic() - began < 8:
                sock.sendall(b"\x03")
                time.sleep(0.2)
        else:
            sock.sendall(b"\x03" + bytes(2 * HANDSHAKE))
            messages = Messages(io.BufferedReader(io.BytesIO()), sock.sendall, 0)  # type: ignore[arg-type]
            for command in commands:
                messages.write(Kind.COMMAND, command)
            messages.write(Kind.PICTURE, b"\x17\x00\x00\x00\x00" + bytes(500))
            while sock.recv(4096):
                assert time.monotonic() - began < 8
    assert time.monotonic() - began < 8
