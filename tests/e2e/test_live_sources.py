"""Live sources from real peers: pushed by RTMP, pulled by RTMP and HLS, frame by frame over NATS; cuts, and what is refused."""

from __future__ import annotations

import asyncio
import functools
import http.server
import io
import shutil
import subprocess
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
from PIL import Image

from shared.bus.port import Received
from shared.contracts import subjects
from shared.contracts.events import EventKind, StreamEvent
from shared.contracts.sinks import Looking, SourcePreviewed
from shared.contracts.sources import DeviceSource, PushedFrame, PushSource, RtmpListenSource, UrlSource
from shared.embedded import free_port
from tests.support.lab import Lab, Running, reconciles
from tests.support.listening import listening

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(240)]
needs_ffmpeg = pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="no ffmpeg: apt-get install ffmpeg")
LIVE: dict[str, Any] = {"mode": "live", "fps": 8, "steps": 1, "deadline_ms": 3000}


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def lab(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Lab]:
    env = {"RHEOCAST_ALLOWED_HOSTS": "127.0.0.1"}
    async with Lab.start(tmp_path_factory.mktemp("sources"), env=env) as lab:
        yield lab


async def ffmpeg(*arguments: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        "ffmpeg", "-v", "error", "-nostdin", *arguments, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def picture(size: str, seconds: float, *, sound: bool = False, paced: bool = True) -> list[str]:
    """A test picture as FFmpeg draws it, H.264."""
    pace = ["-re"] if paced else []
    drawn = [*pace, "-f", "lavfi", "-i", f"testsrc=size={size}:rate=16:duration={seconds}"]
    heard = ["-f", "lavfi", "-i", f"sine=440:duration={seconds}", "-c:a", "aac"] if sound else []
    video = ["-c:v", "libx264", "-preset", "ultrafast", "-tune", "zerolatency", "-g", "16", "-pix_fmt", "yuv420p"]
    return [*drawn, *heard[:4], *video, *heard[4:]]


async def told(running: Running, kind: EventKind, count: int = 1, seconds: float = 30) -> StreamEvent:
    for _ in range(int(seconds * 100)):
        if len(running.of(kind)) >= count:
            return running.of(kind)[count - 1]
        await asyncio.sleep(0.01)
    raise AssertionError(f"{kind} was not told {count} times: {running.events}")


async def shown(running: Running, frames: int, seconds: float = 30) -> None:
    for _ in range(int(seconds * 100)):
        totals = running.closed.totals if running.closed is not None else None
        if totals is not None and totals.on_time + totals.late >= frames:
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"{frames} frames were not shown: {running.closed}")


@needs_ffmpeg
async def test_a_push_by_rtmp_may_break_off_and_come_back_at_another_size(lab: Lab) -> None:
    output = lab.folder / "pushed.mp4"
    running = await lab.begin(RtmpListenSource(key="secret"), output, **LIVE)
    url = (await told(running, EventKind.LISTENING)).reason
    assert url.startswith("rtmp://127.0.0.1:")
    assert url.endswith("/live/secret")
    first = await ffmpeg(*picture("320x240", 3, sound=True), "-f", "flv", url)
    await told(running, EventKind.SOURCE_BACK)
    await shown(running, 8)
    await first.wait()
    assert (await told(running, EventKind.SOURCE_LOST)).reason
    before = running.closed
    second = await ffmpeg(*picture("480x270", 3), "-f", "flv", url)
    await told(running, EventKind.SOURCE_BACK, 2)
    assert before is not None
    await shown(running, before.totals.on_time + before.totals.late + 8)
    await second.wait()
    ended = await lab.stop(running)
    assert ended.event is EventKind.STOPPED, ended.reason
    assert reconciles(ended)


@needs_ffmpeg
async def test_an_rtmp_server_is_pulled(lab: Lab) -> None:
    url = f"rtmp://127.0.0.1:{free_port()}/live/x"
    server = await ffmpeg(*picture("320x192", 4), "-f", "flv", "-listen", "1", url)
    await listening(server.pid)
    running = await lab.begin(UrlSource(url=url, reconnect_s=0), **LIVE)
    assert running.accepted, running.events
    await shown(running, 8)
    ended = await lab.end(running)
    assert reconciles(ended)
    await server.wait()


class Site(http.server.SimpleHTTPRequestHandler):
    """Files, and a redirect into a private network."""

    def do_GET(self) -> None:
        if self.path.startswith("/away"):
            self.send_response(302)
            self.send_header("Location", "http://10.0.0.1/secret")
            self.end_headers()
        else:
            super().do_GET()

    def log_message(self, format: str, *args: Any) -> None: ...


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    folder = tmp_path_factory.mktemp("site")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Site, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}", folder
    server.shutdown()


@needs_ffmpeg
async def test_hls_plays_to_its_end(lab: Lab, site: tuple[str, Path]) -> None:
    address, folder = site
    made = await ffmpeg(
        *picture("320x180", 3, sound=True, paced=False), "-f", "hls", "-hls_time", "1", str(folder / "a.m3u8")
    )
    assert await made.wait() == 0
    running = await lab.begin(UrlSource(url=f"{address}/a.m3u8"), **LIVE)
    assert running.accepted, running.events
    ended = await lab.end(running)
    assert ended.event is EventKind.STOPPED, ended.reason
    assert ended.totals is not None
    assert ended.totals.frames_in >= 20  # three seconds, thinned to 8 a second
    assert reconciles(ended)


async def test_where_a_source_may_not_lead(lab: Lab, site: tuple[str, Path]) -> None:
    address, folder = site
    (folder / "inside.m3u8").write_text("#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nhttp://10.0.0.1/a.ts\n")
    (folder / "disk.m3u8").write_text("#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile:///etc/passwd\n")
    for url, reason in (
        (f"{address}/away", "private network"),
        (f"{address}/inside.m3u8", ""),
        (f"{address}/disk.m3u8", ""),
        ("http://192.168.7.7/a.mp4", "private network"),
        ("file:///etc/passwd", "addresses begin with"),
        (f"{address}/nothing.mp4", "404"),
    ):
        running = await lab.begin(UrlSource(url=url, reconnect_s=0), **LIVE)
        if not running.accepted:
            assert reason in running.last.reason, (url, running.last.reason)
            continue
        ended = await lab.end(running)
        assert ended.totals is not None
        assert ended.totals.frames_in == 0, url
    device = await lab.begin(DeviceSource(device="/dev/sda"), **LIVE)
    assert "not among those allowed" in device.last.reason


async def test_frames_are_pushed_over_nats_and_the_source_is_looked_at(lab: Lab) -> None:
    running = await lab.begin(PushSource(idle_s=20), **LIVE)
    assert running.accepted, running.events
    previews: list[SourcePreviewed] = []

    async def on_preview(received: Received) -> None:
        previews.append(received.message)

    bus, stream = lab.system.bus, running.stream
    await bus.subscribe(subjects.stream(stream, "preview"), on_preview)
    await bus.publish(subjects.stream(stream, "looking"), Looking(stream=stream, what="source", max_fps=4))
    rng = np.random.default_rng(1)
    for number in range(40):
        height, width = (120, 200) if number < 20 else (96, 160)
        pixels = rng.integers(0, 255, (height // 8, width // 8, 3), np.uint8).repeat(8, 0).repeat(8, 1)
        if number % 2:
            frame = PushedFrame(
                stream=stream, format="rgb24", width=width, height=height, data=pixels.tobytes(), last=number == 39
            )
        else:
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "JPEG")
            frame = PushedFrame(stream=stream, data=file.getvalue() if number != 10 else b"no picture")
        await bus.publish(subjects.stream(stream, "push"), frame)
        await asyncio.sleep(0.08)
    ended = await lab.end(running)
    assert ended.event is EventKind.STOPPED, ended.reason
    assert ended.totals is not None
    assert ended.totals.on_time + ended.totals.late >= 12
    assert reconciles(ended)
    assert 3 <= len(previews) <= 20
    assert (previews[0].width, previews[0].height) == (160, 96)
