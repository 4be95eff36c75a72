"""A running Rheocast for a benchmark: started here, or one that is up already; and streams that are watched."""

from __future__ import annotations

import asyncio
import platform
import secrets
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from services.cli.system import System
from services.cli.topology import Topology, usable_cores
from shared.bus.nats import NatsBus
from shared.bus.port import Received
from shared.contracts import subjects
from shared.contracts.commands import Mode, PatternSource, StartStream, StopStream, StreamSpec
from shared.contracts.events import ChunkClosed, EventKind, FramesDecoded, StreamEvent, StreamStats

ANSWER_S = 60.0
END_S = 60.0


@dataclass(slots=True)
class Decoded:
    """A chunk whose pixels are ready: when its frames were captured and it was published, and what each hop took."""

    chunk: int
    first_ns: int
    last_ns: int
    published_ns: int
    ready_ns: int
    hops: tuple[tuple[str, float, float], ...]  # hop, waited ms, worked ms


@dataclass(slots=True)
class Watched:
    """A stream and what was heard of it. Times are UNIX ns."""

    stream: str
    spec: StreamSpec
    asked_ns: int
    events: list[StreamEvent] = field(default_factory=list)
    closed: list[tuple[int, ChunkClosed]] = field(default_factory=list)
    decoded: list[Decoded] = field(default_factory=list)
    first_shown_ns: int = 0
    final: StreamEvent | None = None
    answered: asyncio.Event = field(default_factory=asyncio.Event)
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    async def on_event(self, received: Received) -> None:
        """A lifecycle event."""
        event: StreamEvent = received.message
        self.events.append(event)
        if event.event in (EventKind.ACCEPTED, EventKind.REFUSED):
            self.answered.set()
        if event.event is EventKind.REFUSED and not self.accepted:
            self.ended.set()
        elif event.event in (EventKind.STOPPED, EventKind.FAILED) and event.service == "egress":
            self.final = event
            self.answered.set()
            self.ended.set()

    async def on_closed(self, received: Received) -> None:
        """Verdicts."""
        message: ChunkClosed = received.message
        if not self.first_shown_ns and message.totals.on_time + message.totals.late:
            self.first_shown_ns = time.time_ns()
        if not self.closed or message.closed_chunks > self.closed[-1][1].closed_chunks:
            self.closed.append((time.time_ns(), message))

    async def on_frames(self, received: Received) -> None:
        """A chunk is ready at egress."""
        message = received.message
        if isinstance(message, FramesDecoded):
            stamp, now = message.stamp, time.time_ns()
            hops = tuple((t.hop, t.queue_ms, t.compute_ms) for t in message.timings)
            first, last = stamp.frames[0].captured_ns, stamp.frames[-1].captured_ns
            self.decoded.append(Decoded(stamp.chunk, first, last, stamp.published_ns, now, hops))

    @property
    def accepted(self) -> bool:
        """Whether it was let in."""
        return any(event.event is EventKind.ACCEPTED for event in self.events)

    @property
    def refusal(self) -> StreamEvent | None:
        """Why not."""
        return next((event for event in self.events if event.event is EventKind.REFUSED), None)

    @property
    def stats(self) -> StreamStats:
        """What egress measured, known at the end."""
        return (self.final.stats if self.final is not None else None) or StreamStats()

    @property
    def ttff_s(self) -> float:
        """From the command to the first chunk that was shown, in seconds; 0: none was."""
        return (self.first_shown_ns - self.asked_ns) / 1e9 if self.first_shown_ns else 0.0

    @property
    def attained(self) -> float:
        """The share of all captured frames that were shown within their deadline (those skipped on purpose count)."""
        totals = self.final.totals if self.final is not None else None
        return (totals.on_time + totals.skipped) / totals.frames_in if totals is not None and totals.frames_in else 0.0

    @property
    def reconciles(self) -> bool:
        """Whether every input frame has exactly one verdict."""
        totals = self.final.totals if self.final is not None else None
        return totals is not None and totals.closed == totals.frames_in

    def figures(self) -> dict[str, Any]:
        """What became of the stream."""
        stats, totals = self.stats, self.final.totals if self.final is not None else None
        return {
            "cpr": round(stats.cpr, 4),
            "attained": round(self.attained, 4),
            "ttff_s": round(self.ttff_s, 3),
            "first_frame_ms": round(stats.first_frame_ms, 1),
            "latency_p50_ms": round(stats.latency_p50_ms, 1),
            "latency_p95_ms": round(stats.latency_p95_ms, 1),
            "latency_p99_ms": round(stats.latency_p99_ms, 1),
            "jitter_p95_ms": round(stats.jitter_p95_ms, 1),
            "fps": round(stats.fps, 2),
            "frames_in": totals.frames_in if totals is not None else 0,
            "dropped": totals.dropped if totals is not None else {},
            "reconciles": self.reconciles,
        }


class Driver:
    """Streams on one system. ``system`` is None where it was up already."""

    def __init__(self, bus: NatsBus, system: System | None, gateway: str) -> None:
        self.bus, self.system, self.gateway = bus, system, gateway
        self.running: list[Watched] = []

    async def begin(self, *, frames: bool = False, wait: bool = True, **fields: Any) -> Watched:
        """Ask for a live stream of the test pattern; ``fields`` are a spec's. ``frames``: watch each chunk, too."""
        values = {"source": PatternSource(), "prompt": "a pencil drawing", "mode": Mode.LIVE, "audio": False}
        spec = StreamSpec.model_validate({**values, **fields})
        watched = Watched(f"bench-{secrets.token_hex(4)}", spec, time.time_ns())
        await self.bus.subscribe(subjects.stream(watched.stream, "event"), watched.on_event)
        await self.bus.subscribe(subjects.stream(watched.stream, "closed"), watched.on_closed)
        if frames:
            await self.bus.subscribe(subjects.stream(watched.stream, "frames"), watched.on_frames)
        watched.asked_ns = time.time_ns()
        command = StartStream(command=secrets.token_hex(8), stream=watched.stream, spec=spec)
        await self.bus.publish(subjects.stream(watched.stream, "control"), command)
        if wait:
            await asyncio.wait_for(watched.answered.wait(), ANSWER_S)
        if watched.accepted or not wait:
            self.running.append(watched)
        return watched

    async def stop(self, *streams: Watched) -> None:
        """Stop streams, and wait for their figures."""
        for watched in streams:
            if watched.accepted and not watched.ended.is_set():
                command = StopStream(command=secrets.token_hex(8), stream=watched.stream, drain=True)
                await self.bus.publish(subjects.stream(watched.stream, "control"), command)
        for watched in streams:
            if watched.accepted:
                await asyncio.wait_for(watched.ended.wait(), END_S)
            if watched in self.running:
                self.running.remove(watched)

    async def warm_up(self, **fields: Any) -> None:
        """One short stream, so that what follows meets a warm system."""
        watched = await self.begin(**fields)
        await asyncio.sleep(3.0)
        await self.stop(watched)
        await asyncio.sleep(0.5)  # until everybody has let go of it

    @property
    def names(self) -> tuple[str, ...]:
        """The services that were started here."""
        return tuple(self.system.supervisor.children) if self.system is not None else ()

    def pid(self, name: str) -> int:
        """The process of a service that was started here."""
        child = self.system.supervisor.children[name] if self.system is not None else None
        if child is None or child.pid is None:
            raise SystemExit(f"{name} was not started by this benchmark: leave --nats out")
        return child.pid


@asynccontextmanager
async def driving(
    *, nats: str = "", gateway: str = "", env: Mapping[str, str] | None = None, port: int | None = None, stages: int = 1
) -> AsyncIterator[Driver]:
    """A system of this benchmark's own, or with ``nats`` (and ``gateway``) URLs the one that is up there."""
    if nats:
        bus = await NatsBus.connect(nats, name="bench")
        try:
            yield Driver(bus, None, gateway)
        finally:
            await bus.close()
        return
    nowhere = Path("/nonexistent")
    topology = Topology(
        model="rheo-tiny",
        stages=stages,
        read_roots=(nowhere,),
        write_roots=(nowhere,),
        gateway_port=port,
        extra_env=env or {},
    )
    async with System(topology) as system:
        await system.wait_ready()
        yield Driver(system.bus, system, f"http://127.0.0.1:{port}" if port else "")


def machine() -> str:
    """What this runs on, in words."""
    name = ""
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        name = lines[0].partition(":")[2].strip() if lines else ""
    return f"{name or platform.processor() or platform.machine()}, {usable_cores()} cores"
