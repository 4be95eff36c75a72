"""A whole Rheocast as processes on real servers, driven over the bus like a platform would."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import av
import numpy as np

from services.cli.system import System
from services.cli.topology import Topology
from shared.bus.port import Received
from shared.contracts import subjects
from shared.contracts.commands import (
    FileSource,
    Mode,
    Mp4Sink,
    Source,
    StartStream,
    StopStream,
    StreamPatch,
    StreamSpec,
    UpdateStream,
)
from shared.contracts.events import ChunkClosed, EventKind, StreamEvent


@dataclass(slots=True)
class Running:
    """A stream under way and what was heard of it."""

    stream: str
    output: Path | None
    events: list[StreamEvent] = field(default_factory=list)
    closed: ChunkClosed | None = None
    final: StreamEvent | None = None
    answered: asyncio.Event = field(default_factory=asyncio.Event)
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    async def on_event(self, received: Received) -> None:
        event: StreamEvent = received.message
        self.events.append(event)
        if event.event in (EventKind.ACCEPTED, EventKind.REFUSED):
            self.answered.set()
        if event.event is EventKind.REFUSED and not self.accepted:  # else a change was refused: the stream goes on
            self.ended.set()
        elif event.event in (EventKind.STOPPED, EventKind.FAILED) and event.service == "egress" and self.accepted:
            self.final = event
            self.ended.set()

    async def on_closed(self, received: Received) -> None:
        self.closed = received.message

    @property
    def accepted(self) -> bool:
        return bool(self.of(EventKind.ACCEPTED))

    @property
    def last(self) -> StreamEvent:
        """How it ended: egress' closing event, else the newest one."""
        return self.final or self.events[-1]

    def of(self, kind: EventKind) -> list[StreamEvent]:
        return [event for event in self.events if event.event is kind]


class Lab:
    """Starts streams on a running system and waits for their end."""

    def __init__(self, system: System, folder: Path, batch_log: Path) -> None:
        self.system = system
        self.folder = folder
        self.batch_log = batch_log
        self.begun: list[Running] = []

    @classmethod
    @asynccontextmanager
    async def start(
        cls,
        folder: Path,
        stages: int = 1,
        env: Mapping[str, str] | None = None,
        gateway_port: int | None = None,
        pipelines: int = 1,
        roots: tuple[Path, ...] = (),
    ) -> AsyncIterator[Lab]:
        """``roots``: other folders that may be read and written; ``folder`` always may."""
        batch_log = folder / "batches.jsonl"
        topology = Topology(
            model="rheo-tiny",
            stages=stages,
            read_roots=(folder, *roots),
            write_roots=(folder, *roots),
            gateway_port=gateway_port,
            batch_log=batch_log,
            extra_env=env or {},
            pipelines=pipelines,
        )
        async with System(topology, run_dir=folder / "run") as system:
            await system.wait_ready()
            yield cls(system, folder, batch_log)

    def spec(self, source: Path | Source, output: Path | None, **fields: Any) -> StreamSpec:
        values: dict[str, Any] = {
            "source": FileSource(path=str(source)) if isinstance(source, Path) else source,
            "prompt": "a pencil drawing",
            "mode": Mode.LOSSLESS,
            "width": 160,
            "height": 96,
        }
        if output is not None:
            values["sinks"] = (Mp4Sink(path=str(output)),)
        return StreamSpec.model_validate({**values, **fields})

    async def begin(self, source: Path | Source, output: Path | None = None, **fields: Any) -> Running:
        """Start a stream and wait until it is accepted or refused."""
        running = Running(f"t-{secrets.token_hex(4)}", output)
        self.begun.append(running)
        bus = self.system.bus
        await bus.subscribe(subjects.stream(running.stream, "event"), running.on_event)
        await bus.subscribe(subjects.stream(running.stream, "closed"), running.on_closed)
        spec = self.spec(source, output, **fields)
        await self.control(running, StartStream(command=secrets.token_hex(8), stream=running.stream, spec=spec))
        await asyncio.wait_for(running.answered.wait(), 60)
        return running

    async def control(self, running: Running, command: StartStream | UpdateStream | StopStream) -> None:
        await self.system.bus.publish(subjects.stream(running.stream, "control"), command)

    async def update(self, running: Running, **patch: Any) -> StreamEvent:
        """Change a running stream and wait for the applied event."""
        command = secrets.token_hex(8)
        message = UpdateStream(command=command, stream=running.stream, patch=StreamPatch(**patch))
        await self.control(running, message)
        return await self.applied(running, command)

    async def applied(self, running: Running, command: str, timeout_s: float = 20.0) -> StreamEvent:
        until = time.monotonic() + timeout_s
        while time.monotonic() < until:
            for event in running.events:
                if event.command == command and event.event in (EventKind.APPLIED, EventKind.REFUSED):
                    return event
            await asyncio.sleep(0.01)
        raise AssertionError(f"the change was never applied: {running.events}")

    async def stop(self, running: Running, drain: bool = True) -> StreamEvent:
        await self.control(running, StopStream(command=secrets.token_hex(8), stream=running.stream, drain=drain))
        return await self.end(running)

    async def stop_all(self) -> None:
        """Ends what a test left running, so that its failure costs the tests behind it nothing."""
        left = [running for running in self.begun if running.accepted and not running.ended.is_set()]
        self.begun.clear()
        for running in left:
            await self.stop(running, drain=False)

    async def end(self, running: Running, timeout_s: float = 120.0) -> StreamEvent:
        """Wait until the stream has stopped, failed or was refused."""
        await asyncio.wait_for(running.ended.wait(), timeout_s)
        return running.last

    async def run(self, source: Path | Source, output: Path | None = None, **fields: Any) -> Running:
        """A stream from start to end."""
        running = await self.begin(source, output, **fields)
        await self.end(running)
        return running

    def batches(self) -> list[dict[str, Any]]:
        """Every batch so far, from the scheduler's log."""
        return [json.loads(line) for line in self.batch_log.read_text().splitlines()]


def frames_of(path: Path) -> np.ndarray:
    """All pictures of a video: uint8 [frames, height, width, 3]."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def seconds_of(path: Path) -> list[float]:
    """The presentation times of a video's pictures."""
    with av.open(str(path)) as container:
        return [frame.time for frame in container.decode(video=0) if frame.time is not None]


def difference(a: np.ndarray, b: np.ndarray) -> int:
    """The largest difference of two videos of the same shape, in 1/255."""
    assert a.shape == b.shape, (a.shape, b.shape)
    return int(np.abs(a.astype(np.int16) - b.astype(np.int16)).max())


def reconciles(event: StreamEvent) -> bool:
    """on_time + late + dropped + skipped == frames_in."""
    totals = event.totals
    return totals is not None and totals.closed == totals.frames_in
