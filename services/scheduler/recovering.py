"""Carries out what :mod:`services.scheduler.recovery` decides: a live stream whose worker is lost goes on."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace

from services.scheduler.core import PipelineCore
from services.scheduler.fleet import Fleet, Pipeline
from services.scheduler.messenger import Messenger, RefusedError, all_of
from services.scheduler.prompting import Prompting
from services.scheduler.records import Phase, StreamRecord
from services.scheduler.recovery import Fate, Recovery, choose, fate, renewed
from services.scheduler.settings import Settings
from shared.bus.port import BusError
from shared.clock import Clock
from shared.contracts.events import EventKind
from shared.contracts.refs import TensorRef
from shared.contracts.sinks import named
from shared.session.port import SessionStore, StoreError
from shared.session.state import IllegalMoveError, Owner, StreamState

log = logging.getLogger(__name__)

GIVEN_UP = "recovering"  # the ledger's word for chunks that were under way: scheduler:recovering
LOOK_S = 0.05
AGAIN_S = 0.5


class Recovering:
    """The streams on their way back. ``records`` and ``cores`` are the desk's own, ``loads`` admission's."""

    def __init__(
        self,
        settings: Settings,
        store: SessionStore,
        clock: Clock,
        fleet: Fleet,
        messenger: Messenger,
        prompting: Prompting,
        records: dict[str, StreamRecord],
        cores: dict[str, PipelineCore],
        loads: Mapping[str, float],
    ) -> None:
        self._settings, self._store, self._clock, self._fleet = settings, store, clock, fleet
        self._messenger, self._prompting = messenger, prompting
        self._records, self._cores, self._loads = records, cores, loads
        self._tries: dict[str, asyncio.Task[None]] = {}
        self._fail: Callable[[str, str], Awaitable[None]] | None = None
        self._core_for: Callable[[Pipeline], PipelineCore] | None = None
        self._pump: Callable[[], None] = lambda: None
        self._release: Callable[[list[TensorRef]], None] = lambda _: None
        self.counters: dict[str, int] = {}

    def wire(
        self,
        fail: Callable[[str, str], Awaitable[None]],
        core_for: Callable[[Pipeline], PipelineCore],
        pump: Callable[[], None],
        release: Callable[[list[TensorRef]], None],
    ) -> None:
        """What the desk does: end a stream, find or make a pipeline's core, schedule soon, give tensors back."""
        self._fail, self._core_for, self._pump, self._release = fail, core_for, pump, release

    def lost(self, record: StreamRecord, instance: str, how: str) -> Awaitable[None] | None:
        """An instance is lost: decided at once; what is returned must be awaited for it to be done. None: no matter."""
        verdict = fate(record, instance)
        if verdict is Fate.RECOVERS:
            recovery = self._begin(record, f"{instance} {how}")
            if recovery is not None:
                return self._recover(record, recovery)
        if verdict is Fate.CLOSES:
            return self._close(record)
        if verdict is Fate.RECOVERING:
            if (attempt := self._tries.get(record.stream)) is not None:
                attempt.cancel()
            return None
        if verdict is Fate.NOTHING or self._fail is None:
            return None
        return self._fail(record.stream, f"{instance} {how}")

    def anew(self, record: StreamRecord, reason: str) -> Awaitable[None] | None:
        """Place a running stream anew, as if a worker of it were lost. None: it is not running."""
        recovery = self._begin(record, reason) if record.phase is Phase.RUNNING else None
        return None if recovery is None else self._recover(record, recovery)

    def without_motion(self) -> list[Awaitable[None]]:
        """What gives running streams whose motion estimator is gone another one; each must be awaited.

        One that comes back under its own name goes on by itself, from its mirror.
        """
        renewals: list[Awaitable[None]] = []
        for record in self._records.values():
            former = record.motion
            if record.phase is Phase.RUNNING and former and not self._fleet.alive(former):
                other = self._fleet.pick("motion")
                if other is not None:
                    log.warning("stream %s: %s is gone, %s goes on from its mirror", record.stream, former, other)
                    record.motion = other
                    renewals.append(self._renew_motion(record, former))
        return renewals

    async def _renew_motion(self, record: StreamRecord, former: str) -> None:
        """The session says which motion the stream has, and that one takes it."""
        async with record.changing:  # a move keeps its own assignment meanwhile
            try:
                await self._store.put(record.stream, Owner.SCHEDULER, {"assignment": record.assignment()})
                await self._messenger.take("motion", record, record.motion, wait=False)
            except (StoreError, BusError) as error:
                log.warning("stream %s has no motion yet: %s", record.stream, error)
                record.motion = former  # asked for again at the next look

    def _begin(self, record: StreamRecord, reason: str) -> Recovery | None:
        """From here on nothing of the lost placement counts: a new epoch, and no queue."""
        core = self._cores.get(record.pipeline)
        queue = core.streams.get(record.stream) if core is not None else None
        if core is None or queue is None:
            return None
        record.move(Phase.RECOVERING)
        record.epoch += 1
        record.source_held = True
        record.suspended = False  # with the placement that held it
        self._release(core.remove(record.stream))
        log.warning("stream %s recovers: %s", record.stream, reason)
        self._count("recovering")
        return Recovery(queue, reason, self._clock.monotonic(), record.pipeline)

    async def _recover(self, record: StreamRecord, recovery: Recovery) -> None:
        stream = record.stream
        try:
            await self._hold(record, recovery)
            while record.phase is Phase.RECOVERING:
                line = recovery.expired(self._clock.monotonic(), self._settings.recover_s)
                if line is not None:
                    await self._give_up(stream, line)
                    return
                pipeline = choose(
                    record, self._fleet.pipelines(), self._records, self._settings.max_streams, self._loads
                )
                if pipeline is None:
                    await self._clock.sleep(LOOK_S)
                elif not await self._try(record, recovery, pipeline):
                    await self._clock.sleep(AGAIN_S)
        except Exception as error:
            if not isinstance(error, RefusedError | StoreError | BusError):
                log.exception("stream %s does not recover", stream)
            await self._give_up(stream, f"{recovery.reason}, and {error}")

    async def _close(self, record: StreamRecord) -> None:
        """A stream that is being stopped: its source has been told, and nothing of what was under way will come."""
        record.epoch += 1
        core = self._cores.get(record.pipeline)
        self._release(core.remove(record.stream) if core is not None else [])
        await self._messenger.take("egress", record, record.egress, given_up=GIVEN_UP)

    async def _egress_back(self, record: StreamRecord, recovery: Recovery) -> None:
        """Until the stream's egress beats again; it finds what it has to know in the session store."""
        while record.phase is Phase.RECOVERING and not self._fleet.alive(record.egress):
            if (line := recovery.expired(self._clock.monotonic(), self._settings.recover_s)) is not None:
                raise RefusedError(line)
            await self._clock.sleep(LOOK_S)

    async def _hold(self, record: StreamRecord, recovery: Recovery) -> None:
        """Nothing more is numbered, and what was under way is closed. Raises RefusedError when somebody does not answer."""
        await self._store.put(record.stream, Owner.SCHEDULER, self._placement(record))
        await self._move(record.stream, StreamState.RECOVERING)
        await self._messenger.tell(record.stream, EventKind.RECOVERING, reason=recovery.reason)
        # Ingest first: after its answer no chunk of the old epoch is numbered any more.
        await self._messenger.take("ingest", record, record.ingest)
        await self._egress_back(record, recovery)
        await self._messenger.take("egress", record, record.egress, given_up=GIVEN_UP)

    async def _try(self, record: StreamRecord, recovery: Recovery, pipeline: Pipeline) -> bool:
        """One try to place the stream; False when it came to nothing."""
        attempt = asyncio.ensure_future(self._place(record, recovery, pipeline))
        self._tries[record.stream] = attempt
        try:
            await asyncio.wait({attempt})
        finally:
            attempt.cancel()
            self._tries.pop(record.stream, None)
        if attempt.cancelled():
            recovery.error = f"{pipeline.name} was lost again"
            return False
        error = attempt.exception()
        if error is None:
            return True
        known = isinstance(error, RefusedError | StoreError | BusError)
        recovery.error = str(error) if known else f"{type(error).__name__}: {error}"
        log.log(
            logging.INFO if known else logging.ERROR,
            "stream %s was not placed on %s: %s",
            record.stream,
            pipeline.name,
            recovery.error,
            exc_info=None if known else error,
        )
        return False

    async def _place(self, record: StreamRecord, recovery: Recovery, pipeline: Pipeline) -> None:
        """As a stream is started, with what it had: raises RefusedError, StoreError or BusError when a step fails."""
        left = [(record.epoch, worker) for worker in record.workers if worker not in pipeline.workers]
        record.pipeline, record.workers = pipeline.name, pipeline.workers
        record.epoch += 1
        await self._store.put(record.stream, Owner.SCHEDULER, self._placement(record))
        for epoch, worker in left:  # it may come back without having noticed that it was gone
            await self._messenger.let_go("worker", record, worker, epoch)
        await all_of(
            *(self._messenger.take("worker", record, worker) for worker in record.workers),
            self._messenger.take("motion", record, record.motion, wait=False),
            self._messenger.take("egress", record, record.egress, given_up=GIVEN_UP),
        )
        version = await self._prompting.prepare(record, await self._prompt(record), record.parts)
        if record.phase is not Phase.RECOVERING or self._core_for is None:
            return  # it was stopped meanwhile
        queue = replace(renewed(recovery.queue, record.epoch, version), width=record.width, height=record.height)
        self._core_for(pipeline).add(queue)
        record.source_held = False
        try:
            await self._messenger.take("ingest", record, record.ingest)
        except BaseException:
            record.source_held = True
            self._core_for(pipeline).remove(record.stream)
            raise
        if record.phase is not Phase.RECOVERING:
            return
        record.move(Phase.RUNNING)
        self._count("resumed")
        await self._move(record.stream, StreamState.LIVE)
        took = self._clock.monotonic() - recovery.since
        where = "" if pipeline.name == recovery.pipeline else f", on pipeline {pipeline.name}"
        if record.egress in recovery.reason.split():
            again = ", ".join(sink.id for sink in named(record.spec.sinks))
            where += f"; its sinks were opened again: {again}"
        await self._messenger.tell(
            record.stream, EventKind.RESUMED, reason=f"{took:.1f} s after {recovery.reason}{where}", version=version
        )
        self._pump()

    async def _give_up(self, stream: str, line: str) -> None:
        self._count("given_up")
        if self._fail is not None:
            await self._fail(stream, line)

    async def _prompt(self, record: StreamRecord) -> str:
        session = await self._store.get(record.stream)
        kept = (session or {}).get("prompt")
        return kept if isinstance(kept, str) else record.spec.prompt

    async def _move(self, stream: str, state: StreamState) -> None:
        try:
            await self._store.move(stream, state)
        except (IllegalMoveError, LookupError) as error:
            log.debug("stream %s: %s", stream, error)

    @staticmethod
    def _placement(record: StreamRecord) -> dict[str, object]:
        return {"assignment": record.assignment(), "epoch": record.epoch}

    def _count(self, name: str) -> None:
        self.counters[name] = self.counters.get(name, 0) + 1
