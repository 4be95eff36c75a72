"""Glass to glass: from a frame drawn by a publisher (WHIP) to the same frame decoded by a viewer (WHEP).

    python -m bench.latency [--seconds 20] [--fps 12] [--size 192x112] [--steps 1]

The frame's number is burnt into its pixels, as 16 light or dark fields: 12 bits in Gray code (one field changes from frame to
frame, which the autoencoder's four frames to a latent survive best) and 4 to check them. It is read from the result, so
that everything between is measured: both encodes, both jitter buffers, the pipeline, and playout.
What may be buffered beyond computing is one chunk (4 frames) and two frames.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import socket
import statistics
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from aiortc.jitterbuffer import JitterFrame

from bench.system.driver import Decoded, machine
from bench.system.latency import percentile
from services.cli.system import System
from services.cli.topology import Topology
from shared.bus.port import Received
from shared.contracts import subjects
from shared.contracts.events import FramesDecoded
from shared.rtc.jitter import FrameBuffer
from tests.support.webrtc import Camera, Viewer, publisher

COLUMNS, ROWS = 8, 2
BITS = 12
DARK, LIGHT = 30, 225


def code_of(number: int) -> int:
    """16 bits for a frame's number: Gray code and its check."""
    value = number % (1 << BITS)
    gray = value ^ (value >> 1)
    return gray << 4 | check_of(gray)


def check_of(gray: int) -> int:
    """4 bits that a wrong field does not fit."""
    return (gray ^ gray >> 4 ^ gray >> 8) & 15


def number_of(code: int) -> int | None:
    """The number modulo 4096; None when the check does not fit."""
    gray = code >> 4
    if check_of(gray) != code & 15:
        return None
    value = gray
    for shift in (1, 2, 4, 8):
        value ^= value >> shift
    return value


def draw(number: int, width: int, height: int) -> np.ndarray:
    """uint8 [height, width, 3] with the number in its fields."""
    out = np.full((height, width, 3), DARK, np.uint8)
    code = code_of(number)
    for bit in range(COLUMNS * ROWS):
        if code >> bit & 1:
            row, column = divmod(bit, COLUMNS)
            rows = slice(row * height // ROWS, (row + 1) * height // ROWS)
            out[rows, column * width // COLUMNS : (column + 1) * width // COLUMNS] = LIGHT
    return out


def read(gray: np.ndarray) -> int | None:
    """The number in a picture, uint8 [height, width]; None when it cannot be read."""
    height, width = gray.shape
    code, middle = 0, (int(gray.max()) + int(gray.min())) / 2
    for bit in range(COLUMNS * ROWS):
        row, column = divmod(bit, COLUMNS)
        top, left = int((row + 0.3) * height / ROWS), int((column + 0.3) * width / COLUMNS)
        field = gray[top : int((row + 0.7) * height / ROWS), left : int((column + 0.7) * width / COLUMNS)]
        code |= int(field.mean() > middle) << bit
    return number_of(code)


class Prompt:
    """In place of the library's jitter buffer at the viewer: a frame with its last packet, as browsers give it."""

    def __init__(self) -> None:
        self._buffer = FrameBuffer(lambda _: "H264", time.time_ns)

    def add(self, packet: Any) -> tuple[bool, JitterFrame | None]:
        """A packet came."""
        ask, frame = self._buffer.add(packet)
        return ask, JitterFrame(frame.data, frame.timestamp) if frame is not None else None


class Meter:
    """When frames were drawn, and how long after that they were seen."""

    def __init__(self) -> None:
        self.drawn: dict[int, float] = {}
        self.latencies: list[float] = []
        self.unread = 0
        self.on = False
        self.decoded: list[Decoded] = []

    def draw(self, number: int, width: int, height: int) -> np.ndarray:
        """A frame, noted."""
        picture = draw(number, width, height)
        self.drawn[number % (1 << BITS)] = time.monotonic()
        return picture

    def seen(self, frame: Any) -> None:
        """A frame of the result."""
        now, number = time.monotonic(), read(frame.to_ndarray(format="gray"))
        at = self.drawn.get(number) if number is not None else None
        if not self.on:
            return
        if at is None or now - at > 30:
            self.unread += 1
        else:
            self.latencies.append((now - at) * 1e3)

    async def on_frames(self, received: Received) -> None:
        """A chunk is ready at egress."""
        message = received.message
        if self.on and isinstance(message, FramesDecoded):
            stamp, now = message.stamp, time.time_ns()
            hops = tuple((t.hop, t.queue_ms, t.compute_ms) for t in message.timings)
            first, last = stamp.frames[0].captured_ns, stamp.frames[-1].captured_ns
            self.decoded.append(Decoded(stamp.chunk, first, last, stamp.published_ns, now, hops))


async def measure(*, seconds: float, fps: float, width: int, height: int, steps: int, noise: float) -> dict[str, Any]:
    """One stream on a system of its own."""
    nowhere = Path("/nonexistent")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    topology = Topology(
        model="rheo-tiny", stages=1, read_roots=(nowhere,), write_roots=(nowhere,), gateway_port=port, extra_env={}
    )
    meter = Meter()
    async with System(topology) as system, httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=30) as http:
        await system.wait_ready()
        body = {
            "id": "glass", "source": {"kind": "whip"}, "sinks": [{"kind": "whep"}], "prompt": "no style",
            "width": width, "height": height, "steps": steps, "noise": noise, "fps": fps, "audio": False,
        }  # fmt: skip
        made = await http.post("/v1/streams", json=body)
        made.raise_for_status()
        await system.bus.subscribe(subjects.stream("glass", "frames"), meter.on_frames)
        camera = publisher(http, "glass", Camera(lambda n: meter.draw(n, width, height), fps))
        viewer = Viewer(http, "glass")
        viewer.on_frame = meter.seen
        viewer.pc.getTransceivers()[0].receiver._RTCRtpReceiver__jitter_buffer = Prompt()  # type: ignore[attr-defined]
        (await camera.offer()).raise_for_status()
        (await viewer.offer()).raise_for_status()
        await viewer.wait(int(6 * fps), 60)  # the playout delay has settled
        meter.on = True
        await asyncio.sleep(seconds)
        meter.on = False
        view = (await http.get("/v1/streams/glass")).json()
        await camera.close()
        await viewer.close()
    return {"size": f"{width}x{height}", "fps": fps, "steps": steps, **figures(meter, fps), "ledger": view["ledger"]}


def figures(meter: Meter, fps: float) -> dict[str, Any]:
    """Milliseconds. ``compute``: the median chunk's work in all hops."""
    p50, p95 = percentile(meter.latencies, 0.5), percentile(meter.latencies, 0.95)
    works = [sum(worked for _, _, worked in chunk.hops) for chunk in meter.decoded]
    compute = statistics.median(works) if works else 0.0
    return {
        "frames": len(meter.latencies),
        "unread": meter.unread,
        "p50_ms": round(p50, 1),
        "p95_ms": round(p95, 1),
        "compute_ms": round(compute, 1),
        "beyond_compute_p50_ms": round(p50 - compute, 1),
        "allowed_ms": round(6 / fps * 1e3, 1),
    }


def main() -> None:
    """Measure, and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--fps", type=float, default=12.0)
    parser.add_argument("--size", default="192x112")
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--noise", type=float, default=0.1)
    given = parser.parse_args()
    width, height = (int(side) for side in given.size.split("x"))
    result = asyncio.run(
        measure(seconds=given.seconds, fps=given.fps, width=width, height=height, steps=given.steps, noise=given.noise)
    )
    print(json.dumps({"machine": machine(), **result}, indent=2))


if __name__ == "__main__":
    main()
