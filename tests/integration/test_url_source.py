"""Sources pulled from real peers: ffmpeg serves RTMP, GStreamer RTSP, a web server HLS and files, break and change."""

from __future__ import annotations

import asyncio
import functools
import http.server
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import pytest

from services.ingest.feed import Feed
from services.ingest.links import Links
from services.ingest.reader import Item
from services.ingest.sources.fetch import Fetched, Patience
from services.ingest.sources.port import Picture, Sound, SourceError
from services.ingest.sources.url import UrlSource
from shared.bus.memory import MemoryBus
from shared.contracts.commands import Fit
from shared.contracts.events import EventKind
from shared.media.addresses import AddressError, AddressRules

FFMPEG = shutil.which("ffmpeg")
pytestmark = pytest.mark.skipif(FFMPEG is None, reason="needs ffmpeg: apt-get install ffmpeg")
HERE = AddressRules(private=True)
SYSTEM_PYTHON = "/usr/bin/python3"
RTSP_SERVER = Path(__file__).parents[1] / "support" / "rtsp_server.py"


class Told(Links):
    """Links whose events are kept for the test."""

    def __init__(self, rules: AddressRules = HERE) -> None:
        loop = asyncio.get_running_loop()
        feed: Feed[Item] = Feed(loop, asyncio.Event(), 8)
        super().__init__("s", lambda: 1, MemoryBus(), feed, rules)
        self.events: list[EventKind] = []

    def tell(self, kind: EventKind, reason: str) -> None:
        self.events.append(kind)


def _free_port() -> int:
    with closing(socket.socket()) as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def _ffmpeg(*args: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([FFMPEG or "ffmpeg", "-loglevel", "error", "-nostdin", *args])


def _serve_rtmp(port: int, size: str, seconds: int) -> subprocess.Popen[bytes]:
    """Plays to the first who pulls."""
    return _ffmpeg(
        *("-re", "-f", "lavfi", "-i", f"testsrc=size={size}:rate=15", "-re", "-f", "lavfi", "-i", "sine"),
        *("-t", str(seconds), "-c:v", "libx264", "-preset", "ultrafast", "-tune", "zerolatency", "-g", "15"),
        *("-c:a", "aac", "-f", "flv", "-listen", "1", f"rtmp://127.0.0.1:{port}/live/x"),
    )


def _open(url: str, links: Links, reconnect_s: float = 10.0, fps: float | None = None) -> UrlSource:
    for attempt in range(40):  # the peer may not listen yet
        try:
            return UrlSource(url, reconnect_s, 96, 64, Fit.CROP, fps, True, links)
        except SourceError:
            if attempt == 39:
                raise
            time.sleep(0.1)
    raise AssertionError


@contextmanager
def _web(handler: Callable[..., http.server.BaseHTTPRequestHandler]) -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)


class _Files(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


class _Redirects(_Files):
    def do_GET(self) -> None:
        self.send_response(302)
        self.send_header("Location", "http://10.0.0.1/secret")
        self.end_headers()


def _has_rtsp_server() -> bool:
    """Whether the system's Python has GStreamer's RTSP server."""
    look = "import gi; gi.require_version('GstRtspServer', '1.0'); from gi.repository import GstRtspServer"
    with suppress(OSError):
        return subprocess.run([SYSTEM_PYTHON, "-c", look], capture_output=True, check=False).returncode == 0
    return False


async def test_an_rtsp_server_plays_dies_and_comes_back(tmp_path: Path) -> None:
    if not await asyncio.to_thread(_has_rtsp_server):
        pytest.skip("needs GStreamer's RTSP server: make tools")
    clip = tmp_path / "clip.mp4"
    made = _ffmpeg(
        *("-f", "lavfi", "-i", "testsrc=size=320x240:rate=15", "-f", "lavfi", "-i", "sine", "-t", "20"),
        *("-c:v", "libx264", "-preset", "ultrafast", "-tune", "zerolatency", "-g", "15", "-c:a", "aac", str(clip)),
    )
    assert made.wait(30) == 0
    links, port = Told(), _free_port()

    def serve() -> subprocess.Popen[bytes]:
        return subprocess.Popen([SYSTEM_PYTHON, str(RTSP_SERVER), str(clip), str(port)], stderr=subprocess.DEVNULL)

    servers = [serve()]

    def run() -> list[Picture | Sound]:
        source = _open(f"rtsp://127.0.0.1:{port}/x", links)
        items: list[Picture | Sound] = []
        try:
            for item in source.read():
                items.append(item)
                if len(servers) == 1 and sum(isinstance(i, Picture) for i in items) > 15:
                    servers[0].kill()
                    servers[0].wait(5)
                    servers.append(serve())
                    before = len(items)
                if EventKind.SOURCE_BACK in links.events and sum(isinstance(i, Picture) for i in items[before:]) > 15:
                    break
        finally:
            source.close()
        return items

    try:
        items = await asyncio.to_thread(run)
    finally:
        for server in servers:
            server.kill()
            server.wait(5)
    assert links.events[:2] == [EventKind.SOURCE_LOST, EventKind.SOURCE_BACK]
    pictures = [item for item in items if isinstance(item, Picture)]
    assert all(picture.pixels.shape == (64, 96, 3) for picture in pictures)
    assert pictures[0].pixels.std() > 20, "a test picture, not grey"
    assert all(a.pts < b.pts for a, b in zip(pictures, pictures[1:], strict=False))
    assert any(isinstance(item, Sound) for item in items)


async def test_an_rtmp_peer_leaves_and_comes_back_at_another_size() -> None:
    links, port = Told(), _free_port()
    peers = [_serve_rtmp(port, "320x240", 2)]

    def run() -> list[Picture | Sound]:
        source = _open(f"rtmp://127.0.0.1:{port}/live/x", links)
        assert source.audio is not None
        items: list[Picture | Sound] = []
        try:
            for item in source.read():
                items.append(item)
                if EventKind.SOURCE_LOST in links.events and len(peers) == 1:
                    raise AssertionError("an item came between lost and back")
                if EventKind.SOURCE_BACK in links.events and sum(isinstance(i, Picture) for i in items) > 40:
                    break
        finally:
            source.close()
        return items

    def again() -> None:
        peers[0].wait(20)
        time.sleep(1)
        peers.append(_serve_rtmp(port, "480x480", 6))

    try:
        items, _ = await asyncio.gather(asyncio.to_thread(run), asyncio.to_thread(again))
    finally:
        for peer in peers:
            peer.kill()
            peer.wait(5)
    assert links.events[:2] == [EventKind.SOURCE_LOST, EventKind.SOURCE_BACK]
    pictures = [item for item in items if isinstance(item, Picture)]
    assert all(picture.pixels.shape == (64, 96, 3) for picture in pictures)
    assert all(a.pts < b.pts for a, b in zip(pictures, pictures[1:], strict=False))
    assert all(picture.captured_ns for picture in pictures)
    assert any(isinstance(item, Sound) for item in items)


async def test_hls_and_a_file_by_http_are_read_to_their_end(tmp_path: Path) -> None:
    made = _ffmpeg(
        *("-f", "lavfi", "-i", "testsrc=size=160x120:rate=10", "-t", "3", "-c:v", "libx264", "-preset", "ultrafast"),
        *("-g", "10", "-f", "hls", "-hls_time", "1", "-hls_list_size", "0", str(tmp_path / "index.m3u8")),
    )
    assert made.wait(30) == 0
    clip = _ffmpeg("-i", str(tmp_path / "index.m3u8"), "-c", "copy", str(tmp_path / "late_index.mp4"))
    assert clip.wait(30) == 0
    links = Told()

    def count(url: str) -> int:
        source = _open(url, links)
        try:
            return sum(isinstance(item, Picture) for item in source.read())
        finally:
            source.close()

    with _web(functools.partial(_Files, directory=str(tmp_path))) as root:
        assert await asyncio.to_thread(count, f"{root}/index.m3u8") == 30
        assert await asyncio.to_thread(count, f"{root}/late_index.mp4") == 30
    assert links.events == []


async def test_a_playlist_may_not_name_files_or_private_addresses(tmp_path: Path) -> None:
    secret = tmp_path / "secret.ts"
    made = _ffmpeg("-f", "lavfi", "-i", "testsrc=size=64x64:rate=10", "-t", "1", "-f", "mpegts", str(secret))
    assert made.wait(30) == 0
    rules = AddressRules(hosts=("127.0.0.1",))
    head = "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n"
    web = tmp_path / "web"
    web.mkdir()
    for number, line in enumerate((f"file://{secret}", str(secret), "http://10.0.0.1/x.ts", f"concat:{secret}")):
        (web / f"{number}.m3u8").write_text(f"{head}{line}\n#EXT-X-ENDLIST\n")
    shutil.copy(secret, web / "open.ts")
    (web / "fine.m3u8").write_text(f"{head}open.ts\n#EXT-X-ENDLIST\n")
    links = Told(rules)
    with _web(functools.partial(_Files, directory=str(web))) as root:
        fine = await asyncio.to_thread(
            UrlSource, f"{root}/fine.m3u8", 0.0, 96, 64, Fit.CROP, None, False, links
        )  # the same segment, where it may be named
        fine.close()
        for number in range(4):
            with pytest.raises(SourceError):
                await asyncio.to_thread(UrlSource, f"{root}/{number}.m3u8", 0.0, 96, 64, Fit.CROP, None, False, links)


async def test_redirects_are_checked_like_what_was_given() -> None:
    with _web(_Redirects) as root, pytest.raises(AddressError, match=r"10\.0\.0\.1"):
        await asyncio.to_thread(Fetched, f"{root}/a.mp4", AddressRules(hosts=("127.0.0.1",)), Patience(5.0))


class _Drips(_Files):
    """A header or a body that comes byte by byte and never ends."""

    drip = b"X"

    def do_GET(self) -> None:
        self.wfile.write(b"HTTP/1.1 200 OK\r\n" + (b"X-" if self.path == "/header" else b"\r\n"))
        with suppress(OSError):
            while True:
                self.wfile.write(self.drip)
                time.sleep(0.05)


class _RedirectsSlowly(_Redirects):
    def do_GET(self) -> None:
        time.sleep(0.4)
        self.send_response(302)
        self.send_header("Location", "/again")
        self.end_headers()


@pytest.mark.parametrize("handler", [_Drips, _RedirectsSlowly])
async def test_a_request_ends_in_time_however_slowly_its_answer_comes(handler: type[_Files]) -> None:
    began = time.monotonic()
    with _web(handler) as root, pytest.raises(OSError, match=r"127\.0\.0\.1: "):
        await asyncio.wait_for(asyncio.to_thread(Fetched, f"{root}/header", HERE, Patience(1.0)), 8)
    assert time.monotonic() - began < 2.5


@pytest.mark.parametrize("ends", ["stopped", "until"])
async def test_a_body_that_drips_is_read_no_longer_than_somebody_waits(ends: str) -> None:
    stopped = threading.Event()
    with _web(_Drips) as root:
        patience = Patience(5.0, stopped.is_set)
        fetched = await asyncio.to_thread(Fetched, f"{root}/body", HERE, patience)
        assert await asyncio.to_thread(fetched.read, 100)
        if ends == "stopped":
            stopped.set()
        else:
            patience.until = time.monotonic()
        with pytest.raises(TimeoutError):
            await asyncio.to_thread(_read_all, fetched)
        assert fetched.read(100) == b""
        fetched.close()


def _read_all(fetched: Fetched) -> None:
    for _ in range(200):
        fetched.read(100)


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd",
        "concat:a|b",
        "pipe:0",
        "data:text/plain,x",
        "subfile,,start,0,end,9,,:/etc/passwd",
        "http://127.0.0.1/x",
        "rtmp://[::ffff:127.0.0.1]/live/x",
        "rtsp://169.254.169.254/x",
        "http://2130706433/",
        "https://8.8.8.8@127.0.0.1/",
    ],
)
async def test_what_is_not_allowed_is_never_opened(url: str) -> None:
    with pytest.raises(SourceError):
        UrlSource(url, 0.0, 96, 64, Fit.CROP, None, False, Told(AddressRules()))


async def test_a_silent_peer_is_given_up_in_time() -> None:
    with closing(socket.socket()) as one:
        one.bind(("127.0.0.1", 0))
        one.listen()
        began = time.monotonic()
        url = f"rtsp://127.0.0.1:{one.getsockname()[1]}/x"
        with pytest.raises(SourceError):
            await asyncio.to_thread(UrlSource, url, 0.0, 96, 64, Fit.CROP, None, False, Told())
        assert time.monotonic() - began < 30
