"""Ingest and egress as they are, on one bus, with an echo where the pipeline would be."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np

from services.egress.handlers import Handlers as EgressHandlers
from services.egress.settings import Settings as EgressSettings
from services.ingest.handlers import Handlers as IngestHandlers
from services.ingest.settings import Settings as IngestSettings
from shared.bus.lossy import LossyBus
from shared.bus.memory import MemoryBroker, MemoryBus
from shared.bus.port import Bus, Received
from shared.clock import SystemClock
from shared.contracts import subjects
from shared.contracts.commands import FileSource, LeaveStream, Mode, Mp4Sink, StreamSpec, TakeStream
from shared.contracts.events import ChunkCaptured, ChunkClosed, EventKind, FramesDecoded, SourceEnded, StreamEvent
from shared.session.memory import MemoryStore
from shared.session.port import SessionStore
from shared.session.state import StreamState
from shared.telemetry.setup import silent
from shared.tensors.store import HostTensorStore

SHM = Path("/dev/shm")
Change = Callable[[ChunkCaptured], bool]


class Bench:
    """Both services and what an outsider hears. ``lose`` says of each chunk whether the echo swallows it."""

    def __init__(self, folder: Path, run_id: str, store: SessionStore, settings: dict[str, Any], faults: str) -> None:
        self.folder, self.store = folder, store
        self.broker = MemoryBroker()
        self.bus = MemoryBus(self.broker)
        self._faults = faults
        self._run_id = run_id
        self._settings = {"file_roots": str(folder), **settings}
        self._tensors: list[HostTensorStore] = []
        self.lose: Change = lambda chunk: False
        self.delay_s = 0.0
        self.change: Callable[[int, np.ndarray], np.ndarray] | None = None  # (chunk, pixels) → what the echo gives
        self.events: list[StreamEvent] = []
        self.chunks: list[ChunkCaptured] = []
        self.ends: list[SourceEnded] = []
        self.closed: list[ChunkClosed] = []
        self.answers: dict[str, str | None] = {}
        self.ended = asyncio.Event()
        self._answered = asyncio.Condition()
        self._tasks: set[asyncio.Task[None]] = set()
        self.ingest = self._ingest()
        self.egress = self.new_egress()
        self._echo_tensors = self._tensor_store("worker-0", self.bus)

    def _service_bus(self) -> Bus:
        bus = MemoryBus(self.broker)
        return LossyBus.of(bus, self._faults) if self._faults else bus

    def _tensor_store(self, instance: str, bus: Bus) -> HostTensorStore:
        store = HostTensorStore(SHM, self._run_id, instance, bus=bus, max_bytes=64 << 20)
        self._tensors.append(store)
        return store

    def _ingest(self) -> IngestHandlers:
        names = IngestSettings.model_fields.keys()
        settings = IngestSettings(**{k: v for k, v in self._settings.items() if k in names})
        bus = self._service_bus()
        tensors = self._tensor_store("ingest-0", bus)
        return IngestHandlers("ingest-0", settings, bus, self.store, tensors, silent().tracer)

    def new_egress(self) -> EgressHandlers:
        """Another egress process of the same name: a restart."""
        names = EgressSettings.model_fields.keys()
        settings = EgressSettings(**{k: v for k, v in self._settings.items() if k in names})
        bus = self._service_bus()
        tensors = self._tensor_store(f"egress-{len(self._tensors)}", bus)
        return EgressHandlers("egress-0", settings, bus, self.store, tensors, silent().tracer, SystemClock())

    async def start(self) -> None:
        await self.ingest.start()
        await self.egress.start()
        await self.bus.subscribe(subjects.stream("*", "chunk"), self._on_chunk)
        await self.bus.subscribe(subjects.stream("*", "closed"), self._on_closed)
        await self.bus.subscribe(subjects.stream("*", "event"), self._on_event)
        await self.bus.subscribe(subjects.TAKEN, self._on_taken)

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await self.ingest.close()
        await self.egress.close()
        await self.bus.close()
        for tensors in self._tensors:
            await tensors.aclose()

    # --- the platform's side -----------------------------------------------------------------------------------------

    async def begin(self, source: Path | Any, output: Path | None = None, *, credits: int = 6, **fields: Any) -> str:
        """Start a stream at egress, then at ingest, as the scheduler does. Returns its id."""
        width, height = fields.pop("size", (96, 64))
        spec = StreamSpec.model_validate(
            {
                "source": FileSource(path=str(source)) if isinstance(source, Path) else source,
                "prompt": "as it is",
                "mode": Mode.LOSSLESS,
                **({"sinks": (Mp4Sink(path=str(output)),)} if output is not None else {}),
                **fields,
            }
        )
        stream = f"s-{secrets.token_hex(4)}"
        await self.store.create(stream, spec)
        for service in ("egress", "ingest"):
            take = TakeStream(
                instance=f"{service}-0",
                stream=stream,
                epoch=1,
                spec=spec,
                width=width,
                height=height,
                noise=0.5,
                credits=credits,
                skip_similar=spec.skip_similar,
                steadying=spec.steadying or 0.0,
            )
            if (error := await self.take(service, take)) is not None:
                raise RefusedError(f"{service}: {error}")
        await self.store.move(stream, StreamState.LIVE)
        return stream

    async def take(self, service: str, take: TakeStream) -> str | None:
        """Assign, and wait for the answer."""
        key = f"{take.instance}/{take.stream}/{take.epoch}"
        self.answers.pop(key, None)
        async with asyncio.timeout(10):
            while key not in self.answers:
                await self.bus.publish(subjects.assign(service), take)
                async with self._answered:
                    try:
                        await asyncio.wait_for(self._answered.wait_for(lambda: key in self.answers), 1.0)
                    except TimeoutError:
                        continue
        return self.answers[key]

    async def leave(
        self, service: str, stream: str, *, drain: bool = False, failure: str | None = None, epoch: int = 1
    ) -> None:
        message = LeaveStream(instance=f"{service}-0", stream=stream, epoch=epoch, drain=drain, failure=failure)
        await self.bus.publish(subjects.assign(service), message)

    async def wait_for_chunk(self) -> None:
        """Until one chunk more was numbered (and not skipped)."""
        seen = len(self.chunks)
        async with asyncio.timeout(10):
            while len(self.chunks) == seen:
                await asyncio.sleep(0.01)

    async def end(self, timeout_s: float = 20.0) -> StreamEvent:
        """Wait until egress tells that the stream has ended."""
        await asyncio.wait_for(self.ended.wait(), timeout_s)
        return self.last

    async def run(self, source: Path | Any, output: Path | None = None, **fields: Any) -> StreamEvent:
        await self.begin(source, output, **fields)
        return await self.end()

    @property
    def last(self) -> StreamEvent:
        return [e for e in self.events if e.event in (EventKind.STOPPED, EventKind.FAILED) and e.service == "egress"][
            -1
        ]

    # --- what is heard -----------------------------------------------------------------------------------------------

    async def _on_taken(self, received: Received) -> None:
        taken = received.message
        async with self._answered:
            self.answers[f"{taken.instance}/{taken.stream}/{taken.epoch}"] = taken.error
            self._answered.notify_all()

    async def _on_event(self, received: Received) -> None:
        event: StreamEvent = received.message
        self.events.append(event)
        if event.service == "egress" and event.event in (EventKind.STOPPED, EventKind.FAILED):
            self.ended.set()

    async def _on_closed(self, received: Received) -> None:
        self.closed.append(received.message)

    async def _on_chunk(self, received: Received) -> None:
        if isinstance(received.message, SourceEnded):
            self.ends.append(received.message)
            return
        chunk: ChunkCaptured = received.message
        if any(chunk.stamp == seen.stamp for seen in self.chunks):
            return
        self.chunks.append(chunk)
        if not self.lose(chunk):
            task = asyncio.create_task(self._echo(chunk))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _echo(self, chunk: ChunkCaptured) -> None:
        pixels = await self._echo_tensors.fetch(chunk.pixels)
        self._echo_tensors.release(chunk.pixels)
        if self.delay_s:
            await asyncio.sleep(self.delay_s)
        if self.change is not None:
            pixels = self.change(chunk.stamp.chunk, pixels)
        ref = self._echo_tensors.put(pixels)
        frames = FramesDecoded(stamp=chunk.stamp, pixels=ref, steps=1, prompt_version=1)
        await self.bus.publish(subjects.stream(chunk.stamp.stream, "frames"), frames)


class RefusedError(Exception):
    """A service refused the stream."""


@asynccontextmanager
async def bench(
    folder: Path, run_id: str, *, store: SessionStore | None = None, faults: str = "", **settings: Any
) -> AsyncIterator[Bench]:
    """A running bench; ``settings`` are those of both services."""
    running = Bench(folder, run_id, store or MemoryStore(), settings, faults)
    await running.start()
    try:
        yield running
    finally:
        await running.close()
