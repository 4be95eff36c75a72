"""Messages to streams. No decisions about frames are made here."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

from services.ingest.settings import Settings
from services.ingest.sources.port import SourceError
from services.ingest.stream import IngestStream
from shared.bus.port import Bus, Received, Subscription
from shared.contracts import subjects
from shared.contracts.commands import LeaveStream, PauseStream, TakeStream
from shared.contracts.events import ChunkClosed, StreamTaken
from shared.contracts.tiers import PaceStream
from shared.session.port import SessionStore
from shared.tensors.port import TensorStore

log = logging.getLogger(__name__)

# A repeated assignment that comes just after its stream ended must not open the source again.
REMEMBER_S = 10.0


class Handlers:
    """The assignments of this instance and the streams it has taken."""

    def __init__(
        self, instance: str, settings: Settings, bus: Bus, store: SessionStore, tensors: TensorStore, tracer: Any
    ) -> None:
        self._instance, self._settings = instance, settings
        self._bus, self._store, self._tensors, self._tracer = bus, store, tensors, tracer
        self._streams: dict[str, IngestStream] = {}
        self._opening: dict[str, asyncio.Task[None]] = {}
        self._closed_subs: dict[str, Subscription] = {}
        self._ended: dict[str, tuple[int, float]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._subscription: Subscription | None = None
        self._refusing = ""
        self.idle = asyncio.Event()  # set while no stream is open, once nothing new is taken
        self.counters: dict[str, int] = {}

    @property
    def streams(self) -> tuple[str, ...]:
        """The streams whose sources are open or opening."""
        return (*self._streams, *self._opening)

    async def start(self) -> None:
        """Listen for assignments."""
        self._subscription = await self._bus.subscribe(subjects.assign("ingest"), self.on_assign)

    def refuse(self) -> None:
        """Take no stream any more, and end the sources that are open."""
        self._refusing = "this ingest is shutting down"
        for stream in list(self._streams.values()):
            stream.leave(drain=True)
        self._note_idle()

    async def close(self) -> None:
        """Let everything go."""
        self._refusing = "this ingest is shutting down"
        if self._subscription is not None:
            await self._subscription.unsubscribe()
        for task in [*self._opening.values(), *self._tasks]:
            task.cancel()
        await asyncio.gather(*self._opening.values(), *self._tasks, return_exceptions=True)
        await asyncio.gather(*(stream.close() for stream in list(self._streams.values())), return_exceptions=True)
        for subscription in list(self._closed_subs.values()):
            await subscription.unsubscribe()
        self._streams.clear()

    async def on_assign(self, received: Received) -> None:
        """Take, leave or pause a stream, if this instance is meant."""
        message = received.message
        if message.instance != self._instance:
            return
        if isinstance(message, TakeStream):
            await self._on_take(message)
        elif isinstance(message, LeaveStream):
            await self._on_leave(message)
        elif isinstance(message, PauseStream):
            stream = self._streams.get(message.stream)
            if stream is None or message.epoch < stream.epoch:
                self._count("pause_ignored")
            else:
                await stream.pause(message)
        elif isinstance(message, PaceStream):
            stream = self._streams.get(message.stream)
            if stream is None or not stream.thinner.pace(message.version, message.fps):
                self._count("pace_ignored")

    async def on_closed(self, received: Received) -> None:
        """Verdicts of a stream of this instance."""
        message: ChunkClosed = received.message
        stream = self._streams.get(message.stream)
        if stream is None or message.epoch < stream.epochs.first:  # egress learns last of a new epoch
            self._count("closed_ignored")
            return
        stream.on_closed(message)

    async def _on_take(self, take: TakeStream) -> None:
        self._forget_ended()
        if take.stream in self._opening:
            self._count("take_repeated")
            return
        running = self._streams.get(take.stream)
        if running is not None:
            if take.epoch < running.epoch:
                self._count("take_old_epoch")
                return
            running.adopt(take)
            await self._answer(take, None, running.epochs.from_chunk)
        elif take.epoch <= self._ended.get(take.stream, (-1, 0.0))[0]:
            self._count("take_repeated")
        elif self._refusing:
            await self._answer(take, self._refusing)
        elif len(self._streams) + len(self._opening) >= self._settings.max_streams:
            await self._answer(take, f"this ingest has its {self._settings.max_streams} streams open; stop one first")
        else:
            # Opening may take seconds, and other streams' messages must not wait for it.
            task = asyncio.create_task(self._open(take), name=f"open-{take.stream}")
            self._opening[take.stream] = task
            task.add_done_callback(lambda task: self._forget_opening(take.stream, task))

    async def _open(self, take: TakeStream) -> None:
        stream = IngestStream(take, self._settings, self._bus, self._store, self._tensors, self._tracer, self._on_done)
        try:
            await stream.open()
            subject = subjects.stream(take.stream, "closed")
            self._closed_subs[take.stream] = await self._bus.subscribe(subject, self.on_closed)
            _raise_cancellation()
        except SourceError as error:
            self._opening.pop(take.stream, None)
            await stream.close()
            await self._answer(take, str(error))
            return
        except BaseException:
            self._opening.pop(take.stream, None)
            await self._let_go(stream)
            raise
        self._opening.pop(take.stream, None)
        self._streams[take.stream] = stream
        try:
            await self._answer(take, None)
        finally:
            # Whether it was heard or not: a repeated assignment is answered, and must find the stream running.
            if self._streams.get(take.stream) is stream:
                stream.start()

    def _forget_opening(self, stream: str, task: asyncio.Task[None]) -> None:
        if self._opening.get(stream) is task:
            del self._opening[stream]
        if not task.cancelled() and (error := task.exception()) is not None:
            log.warning("stream %s could not be taken: %s", stream, error)
        self._note_idle()

    async def _on_leave(self, leave: LeaveStream) -> None:
        opening = self._opening.get(leave.stream)
        if opening is not None:
            opening.cancel()
            return
        stream = self._streams.get(leave.stream)
        if stream is None or leave.epoch < stream.epoch:
            self._count("leave_ignored")
            return
        if stream.leave(leave.drain):
            self._on_done(stream)

    def _on_done(self, stream: IngestStream) -> None:
        if self._streams.get(stream.stream) is not stream:
            return
        del self._streams[stream.stream]
        self._ended[stream.stream] = (stream.epoch, time.monotonic())
        self._note_idle()
        task = asyncio.create_task(self._let_go(stream))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _let_go(self, stream: IngestStream) -> None:
        subscription = self._closed_subs.pop(stream.stream, None)
        try:
            if subscription is not None:
                await subscription.unsubscribe()
        finally:
            await stream.close()

    async def _answer(self, take: TakeStream, error: str | None, chunk: int = 0) -> None:
        if error is not None:
            log.info("stream %s refused: %s", take.stream, error)
        answer = StreamTaken(
            service="ingest",
            instance=self._instance,
            stream=take.stream,
            epoch=take.epoch,
            error=error,
            chunk=chunk,
        )
        await self._bus.publish(subjects.TAKEN, answer)

    def _forget_ended(self) -> None:
        now = time.monotonic()
        for stream, (_, at) in list(self._ended.items()):
            if now - at > REMEMBER_S:
                del self._ended[stream]

    def _note_idle(self) -> None:
        if self._refusing and not self._streams:
            self.idle.set()

    def _count(self, name: str) -> None:
        self.counters[name] = self.counters.get(name, 0) + 1


def _raise_cancellation() -> None:
    """Raise a cancellation that was swallowed: ``asyncio.wait_for`` of Python 3.11 loses one that meets its result."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError
