"""WHIP in, WHEP out: real peers, candidates trickled through the real gateway, every service a process of its own."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import pytest_asyncio

from services.cli.system import System
from services.cli.topology import Topology
from shared.bus.port import Received
from shared.contracts import subjects
from shared.contracts.events import EventKind, StreamEvent
from tests.support.webrtc import FRAGMENT, Camera, Microphone, ScopeClient, Viewer, publisher

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120), pytest.mark.asyncio(loop_scope="module")]

WIDTH, HEIGHT, FPS = 96, 64, 10


def picture(number: int) -> np.ndarray:
    """A bright square that wanders over a dark ground."""
    out = np.full((HEIGHT * 2, WIDTH * 2, 3), 40, np.uint8)
    left = number * 4 % (WIDTH * 2 - 32)
    out[40:90, left : left + 32] = (230, 180, 60)
    return out


class World:
    """A running system."""

    def __init__(self, system: System, http: httpx.AsyncClient) -> None:
        self.system, self.http = system, http
        self.events: list[StreamEvent] = []

    async def begin(self, stream: str, **source: Any) -> None:
        body = {
            "id": stream,
            "source": {"kind": "whip", **source},
            "sinks": [{"kind": "whep"}],
            "prompt": "a pencil drawing",
            "width": WIDTH,
            "height": HEIGHT,
            "steps": 1,
            "fps": FPS,
            "deadline_ms": 2000,
        }
        answer = await self.http.post("/v1/streams", json=body)
        assert answer.status_code == 201, answer.text

    async def end(self, stream: str) -> None:
        await self.http.delete(f"/v1/streams/{stream}", params={"drain": "false"})
        await self.hear(stream, EventKind.STOPPED)

    async def hear(self, stream: str, kind: EventKind, count: int = 1, timeout_s: float = 15.0) -> StreamEvent:
        """The ``count``-th event of a kind."""
        async with asyncio.timeout(timeout_s):
            while True:
                found = [e for e in self.events if e.stream == stream and e.event is kind]
                if len(found) >= count:
                    return found[count - 1]
                await asyncio.sleep(0.05)

    async def on_event(self, received: Received) -> None:
        self.events.append(received.message)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    nowhere = Path("/nonexistent")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    turn = {
        "RHEOCAST_ICE_STUN": "stun:127.0.0.1:3478",
        "RHEOCAST_ICE_TURN": "turn:127.0.0.1:3479",
        "RHEOCAST_ICE_TURN_SECRET": "only for tests",
    }
    topology = Topology(
        model="rheo-tiny",
        stages=1,
        read_roots=(nowhere,),
        write_roots=(nowhere,),
        gateway_port=port,
        extra_env={**os.environ, **turn},
    )
    async with System(topology) as system:
        await system.wait_ready()
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=20) as http:
            world = World(system, http)
            await system.bus.subscribe(subjects.stream(subjects.ANY, "event"), world.on_event)
            for _ in range(100):
                try:
                    await http.get("/healthz")
                    break
                except httpx.HTTPError:
                    await asyncio.sleep(0.1)
            yield world


async def test_a_publisher_is_seen_by_viewers_with_sound_and_one_encode(world: World) -> None:
    await world.begin("cam")
    camera = publisher(world.http, "cam", Camera(picture, FPS), Microphone())
    answer = await camera.offer()
    assert answer.status_code == 201, answer.text
    links = answer.headers.get_list("link")
    assert any('<stun:127.0.0.1:3478>; rel="ice-server"' in link for link in links)
    assert any("turn:127.0.0.1:3479" in link and "credential=" in link for link in links)
    viewers = [Viewer(world.http, "cam", sound=True) for _ in range(3)]
    for viewer in viewers:
        assert (await viewer.offer()).status_code == 201
    bright: list[float] = []
    viewers[0].on_frame = lambda frame: bright.append(float(frame.to_ndarray(format="gray").std()))
    await viewers[0].wait(2 * FPS)
    await viewers[2].wait(5)
    assert max(bright) > 3, "the picture is one flat colour"
    assert all(viewer.sounds > 20 for viewer in viewers)

    second = publisher(world.http, "cam", Camera(picture, FPS))
    refused = await second.offer()
    assert refused.status_code == 409
    assert "takeover" in refused.json()["detail"]
    await second.close()
    taking = publisher(world.http, "cam", Camera(picture, FPS))
    assert (await taking.offer(takeover=True)).status_code == 201
    await viewers[1].wait(FPS)
    for client in (camera, taking, *viewers):
        await client.close()
    await world.end("cam")


async def test_faults_on_the_way_heal_by_themselves(world: World) -> None:
    await world.begin("rough")
    camera, viewer = publisher(world.http, "rough", Camera(picture, FPS)), Viewer(world.http, "rough")
    assert (await camera.offer()).status_code == 201
    assert (await viewer.offer()).status_code == 201
    await viewer.wait(FPS)
    assert camera.link is not None
    camera.link.lose, camera.link.reorder = 0.1, 0.2
    await viewer.wait(3 * FPS)
    assert camera.link.lost + camera.link.reordered > 5
    camera.link.lose = camera.link.reorder = 0.0
    camera.link.cut = True
    lost = await world.hear("rough", EventKind.SOURCE_LOST)
    assert "no picture for" in lost.reason
    await asyncio.sleep(0.5)
    camera.link.cut = False
    await world.hear("rough", EventKind.SOURCE_BACK, count=2)
    await viewer.wait(FPS)
    # One that leaves and comes back goes on with the same stream.
    await camera.close()
    await world.hear("rough", EventKind.SOURCE_LOST, count=2)
    again = publisher(world.http, "rough", Camera(picture, FPS))
    assert (await again.offer()).status_code == 201
    await viewer.wait(FPS)
    state = (await world.http.get("/v1/streams/rough")).json()
    assert state["state"] in ("live", "degraded"), state
    await again.close()
    await viewer.close()
    await world.end("rough")


async def test_what_cannot_be_is_said(world: World) -> None:
    await world.begin("odd", reconnect_s=1)
    http, sdp = world.http, {"content-type": "application/sdp"}
    for path in ("/v1/streams/odd/whip", "/v1/streams/odd/whep"):
        assert (await http.post(path, content="v=0", headers={"content-type": "text/plain"})).status_code == 415
        broken = await http.post(path, content="hello", headers=sdp)
        assert (broken.status_code, broken.headers["content-type"]) == (422, "application/problem+json")
        assert (await http.get(path)).status_code == 405
        options = await http.options(path)
        assert (options.status_code, options.headers["accept-post"]) == (204, "application/sdp")
        gone = await http.delete(f"{path}/nobody")
        assert gone.status_code == 404
    assert (await http.post("/v1/streams/none/whip", content="v=0", headers=sdp)).status_code == 404
    vp8 = Viewer(http, "odd", codec="vp8")
    refused = await vp8.offer()
    assert (refused.status_code, "H.264" in refused.json()["detail"]) == (406, True)
    await vp8.close()
    viewer = Viewer(http, "odd")
    assert (await viewer.offer(trickle=False)).status_code == 201
    assert (await viewer.trickle("a=mid:0\r\n", etag='"other"')).status_code == 412
    assert (await viewer.trickle("a=mid:0\r\n", etag="*")).status_code == 422
    assert (await viewer.trickle("a=ice-ufrag:abcd\r\na=ice-pwd:0123456789012345678901\r\n")).status_code == 422
    assert (await viewer.trickle("what is this")).status_code == 422
    assert (await viewer.trickle("a=candidate:1 1 UDP 1 a.local 9 typ host\r\n")).status_code == 204
    bare = await http.patch(viewer.location, content="a=mid:0", headers={"content-type": FRAGMENT})
    assert bare.status_code == 428
    await viewer.close()
    servers = (await http.get("/v1/ice-servers")).json()["iceServers"]
    assert servers[1]["username"].partition(":")[0].isdigit()
    await world.end("odd")


async def test_an_encoder_makes_its_stream_with_one_request(world: World) -> None:
    obs = publisher(world.http, "unused", Camera(picture, FPS))
    obs.path = "/v1/whip"
    answer = await obs.offer(trickle=False, prompt="neon", reconnect_s=1, width=WIDTH, height=HEIGHT, fps=8)
    assert answer.status_code == 201, answer.text
    stream = obs.location.split("/")[3]
    await world.hear(stream, EventKind.SOURCE_BACK)
    await obs.close()
    # Nobody comes back: the source ends, and with it the stream.
    await world.hear(stream, EventKind.STOPPED)


async def test_a_client_of_scope_sends_sees_and_changes_its_stream(world: World) -> None:
    http = world.http
    assert (await http.get("/health")).json()["status"] == "healthy"
    asked = {"pipeline_ids": ["longlive"], "load_params": {"width": WIDTH + 5, "height": HEIGHT, "base_seed": 7}}
    assert (await http.post("/api/v1/pipeline/load", json=asked)).status_code == 200
    status = (await http.get("/api/v1/pipeline/status")).json()
    assert (status["status"], status["pipeline_id"]) == ("loaded", "longlive"), status
    assert (await http.get("/api/v1/webrtc/ice-servers")).json()["iceServers"][0]["urls"] == ["stun:127.0.0.1:3478"]

    client = ScopeClient(http, Camera(picture, FPS))
    prompt = [{"text": "a pencil drawing", "weight": 1.0}]
    answer = await client.offer(input_mode="video", prompts=prompt, denoising_step_list=[700], noise_scale=0.7)
    assert answer.status_code == 200, answer.text
    spread: list[float] = []
    client.on_frame = lambda frame: spread.append(float(frame.to_ndarray(format="gray").std()))
    await client.wait(2 * FPS)
    view = (await http.get(f"/v1/streams/{client.stream}")).json()
    assert (view["width"], view["height"], view["seed"], view["steps"], view["noise"]) == (WIDTH, HEIGHT, 7, 1, 0.7)
    assert (view["source_kind"], view["prompt"]) == ("push", "a pencil drawing")
    assert max(spread) > 3, "the picture is one flat colour"

    await client.opened()
    client.channel.send("what is this")
    warned = await world.hear(client.stream, EventKind.WARNING)
    assert "JSON" in warned.reason
    client.send(prompts=[{"text": "neon lights", "weight": 100}], reset_cache=True)
    applied = await world.hear(client.stream, EventKind.APPLIED)
    assert applied.chunk > 0
    view = (await http.get(f"/v1/streams/{client.stream}")).json()
    assert (view["prompt"], view["state"] in ("live", "degraded")) == ("neon lights", True), view
    await client.wait(FPS // 2)

    await client.close()
    stopped = await world.hear(client.stream, EventKind.STOPPED)
    assert stopped.totals is not None
    assert stopped.totals.closed == stopped.totals.frames_in > 0
    assert (await client.trickle({"candidate": ""})).status_code in (404, 409)


async def test_scopes_text_to_video_by_vp8_and_the_end_that_is_told(world: World) -> None:
    client = ScopeClient(world.http, codec="vp8")
    answer = await client.offer(input_mode="text", prompts=["neon lights"], denoising_step_list=[700])
    assert answer.status_code == 200, answer.text
    assert "a=sendonly" in answer.json()["sdp"]
    await client.wait(FPS)
    await client.opened()
    client.send(paused=True)
    await world.hear(client.stream, EventKind.APPLIED)
    assert (await world.http.get(f"/v1/streams/{client.stream}")).json()["paused"]
    assert (await world.http.delete(f"/api/v1/webrtc/offer/{client.stream}.nobody")).status_code == 404
    await world.http.delete(f"/v1/streams/{client.stream}", params={"drain": "false"})
    await world.hear(client.stream, EventKind.STOPPED)
    async with asyncio.timeout(10):
        while {"type": "stream_stopped"} not in client.said:
            await asyncio.sleep(0.05)
    await client.close()

    mute = ScopeClient(world.http, direction="recvonly")
    refused = await mute.offer(prompts=[{"text": "x", "weight": -1}])
    assert refused.status_code == 422
    refused = await mute.offer(input_mode="video")
    assert (refused.status_code, "sends no video" in refused.json()["detail"]) == (422, True), refused.text
    await mute.pc.close()
    views = (await world.http.get("/v1/streams", params={"state": ["starting", "live", "degraded"]})).json()["streams"]
    assert [view["id"] for view in views if view["id"].startswith("scope-")] == [], "a refused offer leaves no stream"
    odd = await world.http.post("/api/v1/webrtc/offer", json={"sdp": "hello", "type": "offer"})
    assert (odd.status_code, odd.headers["content-type"]) == (422, "application/problem+json")
