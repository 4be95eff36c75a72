"""Viewers of one stream over HTTP, against every real service: however many look, each picture is made once."""

from __future__ import annotations

import asyncio
import io
import socket
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass

import av
import httpx
import pytest
import pytest_asyncio
import websockets

from shared.bus.port import Received
from shared.contracts import subjects
from shared.contracts.events import EventKind
from shared.contracts.sinks import FramePublished
from shared.contracts.sources import PatternSource
from tests.support.lab import Lab, Running, frames_of

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(240)]

VIEWERS = 50
PICTURES = 6


@dataclass
class Studio:
    """A running system with one live stream, and its gateway's client."""

    lab: Lab
    running: Running
    port: int
    api: httpx.AsyncClient


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def studio(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Studio]:
    folder = tmp_path_factory.mktemp("viewers")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    async with Lab.start(folder, env={"RHEOCAST_MEDIA_DIR": str(folder)}, gateway_port=port) as lab:
        running = await lab.begin(PatternSource(), mode="live", fps=8, steps=1, width=96, height=64)
        assert running.accepted, running.events
        limits = httpx.Limits(max_connections=VIEWERS + 10)
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60, limits=limits) as api:
            yield Studio(lab, running, port, api)


async def pictures_of(api: httpx.AsyncClient, path: str, count: int) -> list[bytes]:
    """The first pictures of a motion JPEG answer."""
    found: list[bytes] = []
    buffer = b""
    async with api.stream("GET", path) as answer:
        assert answer.status_code == 200
        async for piece in answer.aiter_raw():
            buffer += piece
            while (begin := buffer.find(b"\r\n\r\n")) >= 0:
                length = int(buffer[:begin].rpartition(b"Content-Length: ")[2].split(b"\r\n")[0])
                if len(buffer) < begin + 4 + length:
                    break
                found.append(buffer[begin + 4 : begin + 4 + length])
                buffer = buffer[begin + 4 + length + 2 :]
            if len(found) >= count:
                return found
    return found


async def applied(studio: Studio, command: str) -> dict[str, object]:
    until = time.monotonic() + 30
    while time.monotonic() < until:
        receipt = (await studio.api.get(f"/v1/streams/{studio.running.stream}/receipts/{command}")).json()
        if receipt.get("state") in ("applied", "warning"):
            return receipt
        await asyncio.sleep(0.1)
    raise AssertionError(receipt)


async def test_fifty_viewers_cost_one_encode(studio: Studio) -> None:
    made: list[FramePublished] = []

    async def on_out(received: Received) -> None:
        made.append(received.message)

    await studio.lab.system.bus.subscribe(subjects.stream(studio.running.stream, "out"), on_out)
    path = f"/v1/streams/{studio.running.stream}/mjpeg"
    begin = time.monotonic()
    seen = await asyncio.gather(*(pictures_of(studio.api, path, PICTURES) for _ in range(VIEWERS)))
    passed_s = time.monotonic() - begin
    assert [len(pictures) for pictures in seen] == [PICTURES] * VIEWERS
    shown = {picture for pictures in seen for picture in pictures}
    assert shown <= {frame.data for frame in made}, "all of them show what was made once"
    assert len({frame.pts for frame in made}) == len(made), "no picture was encoded twice"
    assert len(made) <= 8 * (passed_s + 3), "as many as the stream has frames, not fifty times as many"


async def test_a_snapshot_a_socket_and_the_source_show_the_stream(studio: Studio) -> None:
    stream = studio.running.stream
    snapshot = await studio.api.get(f"/v1/streams/{stream}/snapshot.jpg")
    assert snapshot.status_code == 200, snapshot.text
    with av.open(io.BytesIO(snapshot.content)) as picture:
        frame = next(picture.decode(video=0))
        assert (frame.width, frame.height) == (96, 64)
    async with websockets.connect(f"ws://127.0.0.1:{studio.port}/v1/streams/{stream}/ws") as socket_:
        assert (await asyncio.wait_for(socket_.recv(), 20))[:3] == b"\xff\xd8\xff"
        await socket_.send(b"\xff\xd8\xff\xe0")
        with pytest.raises(websockets.ConnectionClosed, match="not push"):
            await asyncio.wait_for(_until_closed(socket_), 20)
    with pytest.raises(websockets.InvalidStatus) as refused:
        await websockets.connect(f"ws://127.0.0.1:{studio.port}/v1/streams/none/ws")
    assert refused.value.response.status_code == 404
    with pytest.raises(websockets.InvalidStatus) as foreign:
        await websockets.connect(f"ws://127.0.0.1:{studio.port}/v1/streams/{stream}/ws", origin="http://evil.example")
    assert foreign.value.response.status_code == 403


async def _until_closed(opened: websockets.ClientConnection) -> None:
    while True:
        await opened.recv()


async def test_a_recording_is_made_and_downloaded_while_it_runs(studio: Studio) -> None:
    stream = studio.running.stream
    begun = (await studio.api.post(f"/v1/streams/{stream}/record")).json()
    assert (await applied(studio, begun["command"]))["state"] == "applied"
    listed = (await studio.api.get(f"/v1/streams/{stream}/sinks")).json()
    assert begun["sink"] in [sink["id"] for sink in listed["sinks"]]
    await asyncio.sleep(2.0)
    ended = (await studio.api.delete(f"/v1/streams/{stream}/record")).json()
    assert (await applied(studio, ended["command"]))["state"] == "applied"
    (mine,) = (await studio.api.get(f"/v1/streams/{stream}/recordings")).json()["recordings"]
    assert (mine["name"], mine["recording"]) == (begun["name"], False)
    film = await studio.api.get(f"/v1/recordings/{mine['name']}")
    path = studio.lab.folder / "downloaded.mp4"
    path.write_bytes(film.content)
    assert len(frames_of(path)) >= 4


async def test_hls_is_played_over_the_gateway(studio: Studio) -> None:
    stream = studio.running.stream
    added = await studio.api.post(f"/v1/streams/{stream}/sinks", json={"kind": "hls", "segment_s": 0.5})
    assert added.status_code == 202, added.text
    assert (await applied(studio, added.json()["command"]))["state"] == "applied"
    until, playlist = time.monotonic() + 30, ""
    while time.monotonic() < until and ".m4s" not in playlist:
        await asyncio.sleep(0.2)
        answer = await studio.api.get(f"/v1/streams/{stream}/hls/index.m3u8")
        playlist = answer.text if answer.status_code == 200 else ""
    names = [line for line in playlist.splitlines() if line and not line.startswith("#")]
    segment = await studio.api.get(f"/v1/streams/{stream}/hls/{names[-1]}")
    assert (segment.status_code, segment.headers["content-type"]) == (200, "video/iso.segment")
    assert len(segment.content) > 100


async def test_viewers_are_let_go_when_the_stream_ends(studio: Studio) -> None:
    stream = studio.running.stream
    watching = asyncio.create_task(pictures_of(studio.api, f"/v1/streams/{stream}/mjpeg", 10**6))
    await asyncio.sleep(1.0)
    ended = await studio.lab.stop(studio.running)
    assert ended.event is EventKind.STOPPED, ended.reason
    assert len(await asyncio.wait_for(watching, 20)) > 0
