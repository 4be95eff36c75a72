"""Asking workers for a stream's state and for blocks: repeated until it is answered, since answers may be lost."""

from __future__ import annotations

import asyncio
import secrets
from typing import overload

from services.scheduler.messenger import RefusedError
from shared.bus.port import Bus, Received
from shared.clock import Clock
from shared.contracts import subjects
from shared.contracts.moving import (
    BlocksCut,
    BlocksReady,
    CutOver,
    ExportState,
    ImportState,
    Move,
    Moved,
    PrepareBlocks,
    StateExported,
    StateImported,
    StreamSuspended,
    SuspendStream,
)

RETRY_S = 1.0
_ANSWERS: dict[type[Move], type[Moved]] = {
    ExportState: StateExported,
    ImportState: StateImported,
    PrepareBlocks: BlocksReady,
    CutOver: BlocksCut,
    SuspendStream: StreamSuspended,
}


def new_move() -> str:
    """An id for a request; a repetition keeps it."""
    return secrets.token_hex(6)


class Moves:
    """Requests on ``rheo.worker.assign``, matched with their answers on ``rheo.moved``."""

    def __init__(self, bus: Bus, clock: Clock) -> None:
        self._bus, self._clock = bus, clock
        self._waiting: dict[tuple[type[Moved], str, str, str], asyncio.Future[Moved]] = {}

    async def on_moved(self, received: Received) -> None:
        """A worker's answer. One that nobody waits for is ignored."""
        message: Moved = received.message
        future = self._waiting.get((type(message), message.instance, message.move, _subject_of(message)))
        if future is not None and not future.done():
            future.set_result(message)

    def lost(self, instance: str, how: str) -> None:
        """What a worker was to give or to take of a stream it cannot any more: nobody waits for it longer."""
        for (answer, asked, _, _), future in self._waiting.items():
            if asked == instance and answer in (StateExported, StateImported) and not future.done():
                future.set_exception(RefusedError(f"{instance} {how}"))

    @overload
    async def ask(self, request: ExportState, timeout_s: float) -> StateExported: ...
    @overload
    async def ask(self, request: ImportState, timeout_s: float) -> StateImported: ...
    @overload
    async def ask(self, request: PrepareBlocks, timeout_s: float) -> BlocksReady: ...
    @overload
    async def ask(self, request: CutOver, timeout_s: float) -> BlocksCut: ...
    @overload
    async def ask(self, request: SuspendStream, timeout_s: float) -> StreamSuspended: ...
    async def ask(self, request: Move, timeout_s: float) -> Moved:
        """The worker's answer. Raises RefusedError with the worker's reason, or when none came in time."""
        key = (_ANSWERS[type(request)], request.instance, request.move, _subject_of(request))
        future = self._waiting.setdefault(key, asyncio.get_running_loop().create_future())
        until = self._clock.monotonic() + timeout_s
        try:
            while not future.done() and self._clock.monotonic() < until:
                await self._bus.publish(subjects.assign("worker"), request)
                await asyncio.wait({future}, timeout=min(RETRY_S, max(0.0, until - self._clock.monotonic())))
        finally:
            self._waiting.pop(key, None)
        if not future.done():
            raise RefusedError(f"{request.instance} did not answer {request.kind} within {timeout_s:g} s")
        answer = future.result()
        if answer.error is not None:
            raise RefusedError(answer.error)
        return answer


def _subject_of(message: Move | Moved) -> str:
    """What the message is about: the stream, or the pipeline."""
    if isinstance(message, PrepareBlocks | CutOver | BlocksReady | BlocksCut):
        return message.pipeline
    return message.stream
