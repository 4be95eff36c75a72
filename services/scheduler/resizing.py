"""A live stream that changes its size while it runs: what was begun is shown, then it begins anew at the new size.

Ingest is held (what it captures meanwhile is dropped as ``resized``) until what it numbered has been shown. Then workers,
motion and egress take the stream in a new epoch at the new size, with its prompt, seed and settings, and ingest fits to it.
Whatever fails on the way, the stream goes on as it does after the loss of a worker, at the size that it had.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import replace

from services.scheduler.admitting import Admitting
from services.scheduler.core import PipelineCore
from services.scheduler.messenger import Messenger, RefusedError, all_of
from services.scheduler.prompting import Prompting
from services.scheduler.records import Phase, StreamRecord
from services.scheduler.recovering import Recovering
from services.scheduler.recovery import renewed
from services.scheduler.stream_queue import Change, StreamQueue
from services.scheduler.tiering import Tiering
from shared.bus.port import BusError
from shared.clock import Clock
from shared.contracts.commands import Mode
from shared.contracts.events import EventKind
from shared.contracts.refs import TensorRef
from shared.session.port import SessionStore, StoreError
from shared.session.state import Owner

log = logging.getLogger(__name__)

POLL_S = 0.01
SHOWN_POLL_S = 0.05
BESIDE_S = 2.0  # beyond the deadline: after that long what was under way is given up
RESIZED = "resized"  # the ledger's word for what was given up, and for what came meanwhile


class OvertakenError(RefusedError):
    """The stream is being placed anew for another reason, or was, or ends: who does that has it in hand."""


def check_size(record: StreamRecord, width: int, height: int) -> None:
    """Raises RefusedError where the size cannot change, with what would do."""
    if record.spec.mode is not Mode.LIVE:
        raise RefusedError("a lossless stream keeps its size, for nothing of it may be lost: start another one")
    if record.paused:
        raise RefusedError(f"stream {record.stream} is paused: resume it, then change its size")


class Resizing:
    """One per scheduler. ``opening`` keeps a pipeline's blocks from changing hands, ``release`` gives tensors back."""

    def __init__(
        self,
        store: SessionStore,
        clock: Clock,
        messenger: Messenger,
        prompting: Prompting,
        tiering: Tiering,
        admitting: Admitting,
        recovering: Recovering,
        cores: Mapping[str, PipelineCore],
        opening: Callable[[str], AbstractAsyncContextManager[None]],
        release: Callable[[list[TensorRef]], None],
        pump: Callable[[], None],
    ) -> None:
        self._store, self._clock, self._messenger, self._prompting = store, clock, messenger, prompting
        self._tiering, self._admitting, self._recovering = tiering, admitting, recovering
        self._cores, self._opening, self._release, self._pump = cores, opening, release, pump

    async def resize(self, record: StreamRecord, queue: StreamQueue, command: str, width: int, height: int) -> None:
        """Accepted at once, applied with the first chunk of that size; a warning when the stream keeps its size after all.

        The caller holds the stream's lock. Raises RefusedError when it is not accepted.
        """
        check_size(record, width, height)
        same = (width, height) == (record.width, record.height)
        if not same:
            self._admitting.check_resize(record, queue.model, width, height)
        await self._messenger.tell(record.stream, EventKind.ACCEPTED, command=command)
        if same:
            queue.change(command, Change(queue.settings))
            self._pump()
            return
        former = record.width, record.height
        try:
            async with self._opening(record.pipeline):
                await self._drain(record, queue)
                await self._begin_anew(record, queue, command, width, height)
        except (RefusedError, StoreError, BusError) as error:
            await self._stay(record, queue, command, former, error)
            return
        self._pump()
        log.info("stream %s: %d×%d from now on, %d×%d before", record.stream, width, height, *former)

    async def _drain(self, record: StreamRecord, queue: StreamQueue) -> None:
        """Nothing more is numbered, and what was is shown, or given up in the end."""
        record.epoch, record.source_held = record.epoch + 1, True
        epoch = record.epoch
        await self._keep_place(record)
        await self._messenger.take("ingest", record, record.ingest, held_for=RESIZED)
        first, until = record.epoch_from, self._clock.monotonic() + record.spec.deadline_ms / 1e3 + BESIDE_S
        queue.flush = True  # a shorter frame block is better than waiting
        self._pump()
        while self._clock.monotonic() < until and not (queue.idle and queue.gate.newest >= first - 1):
            await self._clock.sleep(POLL_S)
            _still(record, epoch)
        while self._clock.monotonic() < until:
            _, _, through = await self._store.ledger(record.stream)
            _still(record, epoch)
            if through >= first:
                return
            await self._clock.sleep(SHOWN_POLL_S)

    async def _begin_anew(
        self, record: StreamRecord, queue: StreamQueue, command: str, width: int, height: int
    ) -> None:
        record.width, record.height, record.epoch = width, height, record.epoch + 1
        epoch = record.epoch
        await self._keep_place(record)
        await all_of(
            *(self._messenger.take("worker", record, worker) for worker in record.workers),
            self._messenger.take("motion", record, record.motion, wait=False),
            self._messenger.take("egress", record, record.egress, given_up=RESIZED),
        )
        session = await self._store.get(record.stream)
        kept = (session or {}).get("prompt")
        prompt = kept if isinstance(kept, str) else record.spec.prompt
        version = await self._prompting.prepare(record, prompt, record.parts)
        _still(record, epoch)
        # From here to the end of the block nothing is awaited: there is always one queue of the stream.
        core = self._cores[record.pipeline]
        self._tiering.resized(record, queue.model)
        anew = replace(renewed(queue, epoch, version), width=width, height=height, flush=False)
        self._release(core.remove(record.stream))
        core.add(anew)
        anew.change(command, Change(self._tiering.as_now(record, anew.settings)))
        record.source_held = False
        await self._messenger.take("ingest", record, record.ingest)
        promise = None if record.promise is None else record.promise.model_dump()
        await self._store.put(record.stream, Owner.SCHEDULER, {"promise": promise})

    async def _stay(
        self, record: StreamRecord, queue: StreamQueue, command: str, former: tuple[int, int], error: Exception
    ) -> None:
        """Unless somebody else has it in hand, it is placed anew at the size that its queue has."""
        queue.flush = False
        core = self._cores.get(record.pipeline)
        now = core.streams.get(record.stream) if core is not None else None
        if now is not None:
            record.width, record.height = now.width, now.height
        elif record.phase is not Phase.RECOVERING:
            record.width, record.height = former
        line = f"{error}: the stream goes on at {record.width}×{record.height}"
        log.warning("stream %s: %s", record.stream, line)
        await self._messenger.tell(record.stream, EventKind.WARNING, reason=line, command=command)
        if isinstance(error, OvertakenError):
            return
        if (work := self._recovering.anew(record, "its size could not be changed")) is not None:
            await work

    async def _keep_place(self, record: StreamRecord) -> None:
        place = {"assignment": record.assignment(), "epoch": record.epoch}
        await self._store.put(record.stream, Owner.SCHEDULER, place)


def _still(record: StreamRecord, epoch: int) -> None:
    """Raises OvertakenError when the stream ends, or a worker of it was lost, meanwhile."""
    if record.phase is not Phase.RUNNING or record.epoch != epoch:
        raise OvertakenError(record.failure or f"stream {record.stream} ended, or was placed anew, meanwhile")
