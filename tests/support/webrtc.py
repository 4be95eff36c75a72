"""Real WebRTC peers for tests: a publisher by WHIP and a viewer by WHEP, with trickled candidates and scripted faults."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import av
import httpx
import numpy as np
from aiortc import (
    MediaStreamTrack,
    RTCConfiguration,
    RTCPeerConnection,
    RTCRtpSender,
    RTCSessionDescription,
)
from aiortc.sdp import SessionDescription

FRAGMENT = "application/trickle-ice-sdpfrag"
Draw = Callable[[int], np.ndarray]


class Camera(MediaStreamTrack):
    """Draws ``draw(n)`` (uint8 [height, width, 3]) at ``fps``."""

    kind = "video"

    def __init__(self, draw: Draw, fps: float) -> None:
        super().__init__()
        self._draw, self._fps = draw, fps
        self._start = time.monotonic()
        self.frames = 0

    async def recv(self) -> Any:
        """The next picture when it is due."""
        due = self._start + self.frames / self._fps
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        frame = av.VideoFrame.from_ndarray(self._draw(self.frames), format="rgb24")
        frame.pts, frame.time_base = round(self.frames * 90_000 / self._fps), Fraction(1, 90_000)
        self.frames += 1
        return frame


class Microphone(MediaStreamTrack):
    """A tone."""

    kind = "audio"

    def __init__(self) -> None:
        super().__init__()
        self._start = time.monotonic()
        self._samples = 0

    async def recv(self) -> Any:
        """The next 20 ms."""
        await asyncio.sleep(max(0.0, self._start + self._samples / 48_000 - time.monotonic()))
        at = (np.arange(960) + self._samples) * (2 * np.pi * 440 / 48_000)
        tone = (np.sin(at) * 8000).astype(np.int16)
        frame = av.AudioFrame.from_ndarray(np.repeat(tone, 2)[None], format="s16", layout="stereo")
        frame.pts, frame.sample_rate, frame.time_base = self._samples, 48_000, Fraction(1, 48_000)
        self._samples += 960
        return frame


class Link:
    """The way of a peer's datagrams: ``lose`` of them (0…1) never leave, ``reorder`` of them come later, ``cut`` stops all."""

    def __init__(self, pc: RTCPeerConnection, seed: int = 1) -> None:
        self.lose = self.reorder = 0.0
        self.cut = False
        self.lost = self.reordered = 0
        self._dice = random.Random(seed)
        for transceiver in pc.getTransceivers():
            connection = transceiver.sender.transport.transport._connection
            for protocol in connection._protocols:
                self._tap(protocol)

    def _tap(self, protocol: Any) -> None:
        send, receive = protocol.transport.sendto, protocol.datagram_received
        protocol.send_data = lambda data, addr: self._send(send, data, addr)
        protocol.datagram_received = lambda data, addr: None if self.cut else receive(data, addr)

    async def _send(self, send: Callable[..., None], data: bytes, addr: Any) -> None:
        if self.cut or self._dice.random() < self.lose:
            self.lost += 1
        elif self._dice.random() < self.reorder:
            self.reordered += 1
            asyncio.get_running_loop().call_later(0.03, send, data, addr)
        else:
            send(data, addr)


class RtcClient:
    """One session by HTTP: the offer without candidates, which are trickled afterwards as a browser does."""

    def __init__(self, http: httpx.AsyncClient, path: str) -> None:
        self.http, self.path = http, path
        self.pc = RTCPeerConnection(RTCConfiguration(iceServers=[]))
        self.location = self.etag = ""
        self.response: httpx.Response | None = None
        self.link: Link | None = None

    async def offer(self, *, trickle: bool = True, **params: Any) -> httpx.Response:
        """Negotiate. The response is returned whatever its status."""
        await self.pc.setLocalDescription(await self.pc.createOffer())
        whole = self.pc.localDescription.sdp
        lines = whole.splitlines()
        bare = [line for line in lines if not line.startswith(("a=candidate", "a=end-of-candidates"))]
        body = "\r\n".join(bare if trickle else lines) + "\r\n"
        response = await self.http.post(
            self.path, content=body, params=params, headers={"content-type": "application/sdp"}
        )
        if response.status_code != 201:
            return response
        self.location, self.etag = response.headers["location"], response.headers["etag"]
        await self.pc.setRemoteDescription(RTCSessionDescription(response.text, "answer"))
        self.link = Link(self.pc)
        if trickle:
            told = await self.trickle(fragment_of(whole))
            assert told.status_code == 204, told.text
        return response

    async def trickle(self, fragment: str, etag: str | None = None) -> httpx.Response:
        headers = {"content-type": FRAGMENT, "if-match": self.etag if etag is None else etag}
        return await self.http.patch(self.location, content=fragment, headers=headers)

    async def close(self) -> None:
        if self.location:
            await self.http.delete(self.location)
        await self.pc.close()


def publisher(http: httpx.AsyncClient, stream: str, camera: Camera, sound: MediaStreamTrack | None = None) -> RtcClient:
    """Publishes when it is told to ``offer``."""
    client = RtcClient(http, f"/v1/streams/{stream}/whip")
    client.pc.addTransceiver(camera, direction="sendonly")
    if sound is not None:
        client.pc.addTransceiver(sound, direction="sendonly")
    return client


class Watcher:
    """Counts the pictures that come."""

    frames: int

    async def wait(self, frames: int, timeout_s: float = 20.0) -> None:
        """Until so many more pictures have come."""
        until = self.frames + frames
        async with asyncio.timeout(timeout_s):
            while self.frames < until:
                await asyncio.sleep(0.02)


class Viewer(Watcher, RtcClient):
    """Watches; ``seen`` holds (time, frame) of the last pictures."""

    def __init__(self, http: httpx.AsyncClient, stream: str, *, sound: bool = False, codec: str = "") -> None:
        super().__init__(http, f"/v1/streams/{stream}/whep")
        self.frames = self.sounds = 0
        self.on_frame: Callable[[Any], None] = lambda frame: None
        video = self.pc.addTransceiver("video", direction="recvonly")
        if codec:
            all_codecs = RTCRtpSender.getCapabilities("video").codecs
            video.setCodecPreferences([c for c in all_codecs if c.mimeType.lower() == f"video/{codec}"])
        if sound:
            self.pc.addTransceiver("audio", direction="recvonly")
        self._tasks: list[asyncio.Task[None]] = []
        self.pc.on("track", self._on_track)

    def _on_track(self, track: Any) -> None:
        self._tasks.append(asyncio.ensure_future(self._watch(track)))

    async def _watch(self, track: Any) -> None:
        try:
            while True:
                frame = await track.recv()
                if track.kind == "audio":
                    self.sounds += 1
                else:
                    self.frames += 1
                    self.on_frame(frame)
        except Exception:
            return

    async def close(self) -> None:
        await super().close()
        for task in self._tasks:
            task.cancel()


def fragment_of(sdp: str) -> str:
    """All candidates of a description, as a fragment to trickle."""
    described = SessionDescription.parse(sdp)
    media = described.media[0]
    lines = [f"a=ice-ufrag:{media.ice.usernameFragment}", f"a=ice-pwd:{media.ice.password}"]
    lines += [f"m={media.kind} 9 UDP/TLS/RTP/SAVPF 0", f"a=mid:{media.rtp.muxId}"]
    found = [line for line in sdp.split("m=")[1].splitlines() if line.startswith("a=candidate")]
    return "\r\n".join([*lines, *found, "a=end-of-candidates"]) + "\r\n"


class ScopeClient(Watcher):
    """A client of Scope's API: one offer for both ways, candidates as JSON, the data channel "parameters"."""

    def __init__(
        self, http: httpx.AsyncClient, camera: Camera | None = None, *, codec: str = "", direction: str = "sendrecv"
    ) -> None:
        self.http = http
        self.pc = RTCPeerConnection(RTCConfiguration(iceServers=[]))
        self.channel = self.pc.createDataChannel("parameters", ordered=True)
        self.session = ""
        self.frames = 0
        self.said: list[dict[str, Any]] = []
        self.on_frame: Callable[[Any], None] = lambda frame: None
        self._task: asyncio.Task[None] | None = None
        self.channel.on("message", lambda message: self.said.append(json.loads(message)))
        self.pc.on("track", self._on_track)
        video = self.pc.addTransceiver(camera if camera is not None else "video", direction=direction)
        self.pc.addTransceiver("audio", direction="recvonly")
        if codec:
            all_codecs = RTCRtpSender.getCapabilities("video").codecs
            video.setCodecPreferences([c for c in all_codecs if c.mimeType.lower() == f"video/{codec}"])

    @property
    def stream(self) -> str:
        """What the server calls the stream of this session."""
        return self.session.partition(".")[0]

    async def offer(self, **parameters: Any) -> httpx.Response:
        """Negotiate, candidates one by one. The response is returned whatever its status."""
        await self.pc.setLocalDescription(await self.pc.createOffer())
        lines = self.pc.localDescription.sdp.splitlines()
        bare = [line for line in lines if not line.startswith(("a=candidate", "a=end-of-candidates"))]
        body = {"sdp": "\r\n".join(bare) + "\r\n", "type": "offer", "initialParameters": parameters}
        response = await self.http.post("/api/v1/webrtc/offer", json=body)
        if response.status_code != 200:
            return response
        answer = response.json()
        self.session = answer["sessionId"]
        await self.pc.setRemoteDescription(RTCSessionDescription(answer["sdp"], answer["type"]))
        found = {line.removeprefix("a="): None for line in lines if line.startswith("a=candidate")}
        for candidate in found:
            told = await self.trickle({"candidate": candidate, "sdpMid": "0", "sdpMLineIndex": 0})
            assert told.status_code == 204, told.text
        return response

    async def trickle(self, *candidates: dict[str, Any]) -> httpx.Response:
        return await self.http.patch(f"/api/v1/webrtc/offer/{self.session}", json={"candidates": candidates})

    def send(self, **parameters: Any) -> None:
        """Change the stream."""
        self.channel.send(json.dumps(parameters))

    async def opened(self, timeout_s: float = 20.0) -> None:
        """Until the data channel is open."""
        async with asyncio.timeout(timeout_s):
            while self.channel.readyState != "open":
                await asyncio.sleep(0.02)

    def _on_track(self, track: Any) -> None:
        if track.kind == "video":
            self._task = asyncio.ensure_future(self._watch(track))

    async def _watch(self, track: Any) -> None:
        try:
            while True:
                frame = await track.recv()
                self.frames += 1
                self.on_frame(frame)
        except Exception:
            return

    async def close(self) -> None:
        await self.pc.close()
        if self._task is not None:
            self._task.cancel()
