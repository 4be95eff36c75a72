"""What the scheduler says to others: assignments, repeated until they are answered, and lifecycle events."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Coroutine
from typing import Any

from services.scheduler.records import Answers, StreamRecord
from services.scheduler.settings import Settings
from shared.bus.port import Bus
from shared.clock import Clock
from shared.contracts import subjects
from shared.contracts.commands import LeaveStream, Mode, PauseStream, PreparePrompt, TakeStream
from shared.contracts.events import EventKind, LedgerTotals, StreamEvent, StreamStats
from shared.contracts.tiers import PaceStream, Promise, Refusal, Tier

LOSSLESS_CREDITS = 6
ASSUMED_FPS = 30.0
RETRY_S = 3.0


class RefusedError(Exception):
    """A command that cannot be carried out; the message is the one line to tell.

    ``retry_after_s`` above 0: not now, but the same command may be accepted that much later. ``tier`` would be now.
    """

    def __init__(
        self,
        reason: str,
        retry_after_s: float = 0.0,
        refusal: Refusal = Refusal.OTHER,
        tier: Tier | None = None,
    ) -> None:
        super().__init__(reason)
        self.retry_after_s = retry_after_s
        self.refusal = refusal
        self.tier = tier


class Messenger:
    """Assignments and events of one scheduler."""

    def __init__(self, settings: Settings, bus: Bus, clock: Clock) -> None:
        self._settings = settings
        self._bus = bus
        self._clock = clock
        self.answers = Answers()

    async def take(
        self,
        service: str,
        record: StreamRecord,
        instance: str,
        wait: bool = True,
        given_up: str = "",
        **changes: object,
    ) -> None:
        """Assign a stream, and wait for the answer. ``changes`` are fields that are not the record's."""
        message = TakeStream(
            instance=instance,
            stream=record.stream,
            epoch=record.epoch,
            spec=record.spec,
            width=record.width,
            height=record.height,
            noise=record.noise,
            credits=credits_for(record),
            pipeline=record.pipeline,
            noise_version=record.noise_version,
            source_held=record.source_held,
            given_up=given_up,
            skip_similar=record.skip_similar,
            steadying=record.steadying,
            refreshes=record.refreshes,
            added_sinks=tuple(sorted(record.added_sinks)),
        ).model_copy(update=changes)
        if not wait:
            await self._bus.publish(subjects.assign(service), message)
            return
        key = ("taken", instance, record.stream, str(message.epoch))
        await self.ask(service, message, f"{instance} did not answer in time", key)

    async def ask(
        self, service: str, message: TakeStream | PreparePrompt, complaint: str, key: tuple[str, ...]
    ) -> None:
        """Publish an assignment until it is answered: the answer comes on core NATS and may be lost."""
        answer = self.answers.expect(*key)
        until = self._clock.monotonic() + self._settings.answer_timeout_s
        while not answer.done() and self._clock.monotonic() < until:
            await self._bus.publish(subjects.assign(service), message)
            await asyncio.wait({answer}, timeout=RETRY_S)
        self.answers.forget(*key)
        if not answer.done():
            raise RefusedError(complaint)
        if (error := answer.result()) is not None:
            raise RefusedError(error)

    async def pause(self, record: StreamRecord, command: str, paused: bool) -> None:
        """Ingest stops numbering chunks, or goes on; it answers with an applied event."""
        message = PauseStream(
            instance=record.ingest, stream=record.stream, epoch=record.epoch, command=command, paused=paused
        )
        await self._bus.publish(subjects.assign("ingest"), message)

    async def pace(self, record: StreamRecord) -> None:
        """Ingest takes so many frames a second from now on."""
        message = PaceStream(
            instance=record.ingest,
            stream=record.stream,
            epoch=record.epoch,
            version=record.pace_version,
            fps=record.pace_fps,
        )
        await self._bus.publish(subjects.assign("ingest"), message)

    async def leave(
        self,
        service: str,
        record: StreamRecord,
        instance: str,
        drain: bool,
        failure: str | None,
        epoch: int | None = None,
    ) -> None:
        """Let go; of the record's epoch if none is given."""
        message = LeaveStream(
            instance=instance,
            stream=record.stream,
            epoch=record.epoch if epoch is None else epoch,
            drain=drain,
            failure=failure,
        )
        await self._bus.publish(subjects.assign(service), message)

    async def let_go(self, service: str, record: StreamRecord, instance: str, epoch: int) -> None:
        """An instance that had the stream in an epoch that is over keeps nothing of it."""
        message = LeaveStream(instance=instance, stream=record.stream, epoch=epoch, drain=False)
        await self._bus.publish(subjects.assign(service), message)

    async def tell(
        self,
        stream: str,
        kind: EventKind,
        *,
        reason: str = "",
        command: str = "",
        version: int = 0,
        chunk: int = -1,
        pts: int = -1,
        totals: LedgerTotals | None = None,
        stats: StreamStats | None = None,
        retry_after_s: float = 0.0,
        until_chunk: int = -1,
        refusal: Refusal = Refusal.OTHER,
        tier: Tier | None = None,
        promise: Promise | None = None,
    ) -> None:
        """Publish a lifecycle event."""
        event = StreamEvent(
            stream=stream,
            event=kind,
            service="scheduler",
            at_ns=self._clock.now_ns(),
            reason=reason,
            command=command,
            version=version,
            chunk=chunk,
            pts=pts,
            totals=totals,
            stats=stats,
            retry_after_s=retry_after_s,
            until_chunk=until_chunk,
            refusal=refusal,
            tier=tier,
            promise=promise,
        )
        await self._bus.publish(subjects.stream(stream, "event"), event)


def credits_for(record: StreamRecord) -> int:
    """W: chunks between ingest and egress. Live: what fits into the deadline, and one being captured."""
    if record.spec.mode is Mode.LOSSLESS:
        return LOSSLESS_CREDITS
    chunk_s = 4.0 / (record.spec.fps or ASSUMED_FPS)
    in_time = math.ceil(record.spec.deadline_ms / 1000.0 / chunk_s) + 1
    # One frame block fills while another is under way; with less than a block's chunks none could ever start.
    return max(2 * record.frames_per_block, in_time)


async def tell_refused(messenger: Messenger, stream: str, command: str, error: RefusedError) -> None:
    """The answer to a command that cannot be carried out."""
    await messenger.tell(
        stream,
        EventKind.REFUSED,
        reason=str(error),
        command=command,
        retry_after_s=error.retry_after_s,
        refusal=error.refusal,
        tier=error.tier,
    )


async def all_of(*works: Coroutine[Any, Any, None]) -> None:
    """All of them; when one fails the others are cancelled, and its error is raised."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise
