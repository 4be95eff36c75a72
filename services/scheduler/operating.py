"""What an operator sees and asks: workers and pipelines, cuts, a worker emptied so that it can be stopped."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable

from services.scheduler.desk import StreamDesk
from services.scheduler.fleet import Fleet, Member, Pipeline
from services.scheduler.messenger import RefusedError
from services.scheduler.migrating import Migrator
from services.scheduler.placement import CutsError, choose_pipeline, cuts_of, stage_costs
from services.scheduler.records import Phase, StreamRecord
from services.scheduler.recutting import Recutter
from services.scheduler.settings import Settings
from shared.bus.port import Received
from shared.clock import Clock
from shared.contracts.events import EventKind
from shared.contracts.operating import (
    CutPipeline,
    DrainWorker,
    FleetAsked,
    FleetTold,
    MigrateStream,
    PipelineView,
    Refused,
    WorkerState,
    WorkerView,
)
from shared.contracts.tiers import Refusal
from shared.session.port import StoreError

log = logging.getLogger(__name__)

FULL_RETRY_S = 10.0
DRAIN_RETRY_S = 2.0
DRAIN_PLACE = "drain/"  # in the session store: instance → the incarnation that is being emptied
DRAIN_KEPT_S = 30 * 86_400.0
OF_A_SECOND = 1000.0  # busy milliseconds per second → a share


class Operating:
    """One per scheduler."""

    def __init__(
        self, settings: Settings, clock: Clock, fleet: Fleet, desk: StreamDesk, recutter: Recutter, migrator: Migrator
    ) -> None:
        self._settings, self._clock = settings, clock
        self._fleet, self._desk = fleet, desk
        self._recutter, self._migrator = recutter, migrator
        self._stuck: dict[str, str] = {}  # stream → why it could not be moved away
        self._draining: asyncio.Task[None] | None = None
        self._drained_at = 0.0

    # --- streams -----------------------------------------------------------------------------------------------------

    async def migrate(self, command: MigrateStream) -> None:
        """Answers accepted or refused; migrated follows with the chunk, or a warning when the stream stayed."""
        tell, stream = self._desk.tell, command.stream
        try:
            record = self._desk.records.get(stream)
            if record is None or record.phase is not Phase.RUNNING:
                raise RefusedError(f"stream {stream} is not running")
            target = self.choose(record, command.pipeline)
        except RefusedError as error:
            await tell(
                stream,
                EventKind.REFUSED,
                reason=str(error),
                command=command.command,
                retry_after_s=error.retry_after_s,
                refusal=error.refusal,
            )
            return
        await tell(stream, EventKind.ACCEPTED, command=command.command, reason=f"to pipeline {target.name}")
        try:
            await self._migrator.migrate(record, target, command.command)
        except RefusedError as error:
            await tell(stream, EventKind.WARNING, reason=str(error), command=command.command)

    def choose(self, record: StreamRecord, wanted: str = "") -> Pipeline:
        """Where a stream may move: ``wanted``, or the pipeline with the least load. Raises RefusedError."""
        model = record.spec.model
        fitting = {p.name: p for p in self._fleet.pipelines() if p.model == model and p.name != record.pipeline}
        if wanted:
            if wanted == record.pipeline:
                raise RefusedError(f"stream {record.stream} is on pipeline {wanted} already")
            known = next((p for p in self._fleet.pipelines(usable=False) if p.name == wanted), None)
            if known is None:
                names = ", ".join(sorted(fitting)) or "none"
                line = f"there is no pipeline {wanted}; it could go to: {names}"
                raise RefusedError(line, refusal=Refusal.UNKNOWN)
            if known.model != model:
                raise RefusedError(f"pipeline {wanted} holds {known.model}, the stream needs {model}")
            if wanted not in fitting:
                raise RefusedError(
                    f"pipeline {wanted} takes no stream now: a worker of it is being drained", FULL_RETRY_S
                )
            fitting = {wanted: fitting[wanted]}
        if not fitting:
            raise RefusedError(f"there is no other pipeline for {model} that takes streams", FULL_RETRY_S)
        most = self._settings.max_streams
        loads = {name: self.load(p) for name, p in fitting.items() if len(self._streams(name)) < most}
        chosen = choose_pipeline(loads)
        if chosen is None:
            raise RefusedError(f"{', '.join(sorted(fitting))}: full with {most} streams", FULL_RETRY_S)
        return fitting[chosen]

    def load(self, pipeline: Pipeline) -> float:
        """The share of its slowest stage's time that is spoken for; by the number of streams while nothing is measured."""
        busy = self._busy(pipeline)
        return max(busy) if busy else len(self._streams(pipeline.name)) / self._settings.max_streams

    def _busy(self, pipeline: Pipeline) -> tuple[float, ...]:
        if len(pipeline.blocks) != pipeline.stages or not pipeline.fits:
            return ()
        layers, cuts = self._recutter.layers(pipeline), cuts_of(pipeline.blocks)
        meter, now = self._recutter.of(pipeline.name).meter, self._clock.monotonic()
        costs = meter.workers(cuts, layers, pipeline.decode_stage, now)
        return tuple(cost / OF_A_SECOND for cost in stage_costs(cuts, costs, layers)) if costs else ()

    def _streams(self, pipeline: str) -> list[StreamRecord]:
        return [r for r in self._desk.records.values() if r.pipeline == pipeline and r.phase is not Phase.ENDED]

    # --- the fleet ---------------------------------------------------------------------------------------------------

    async def on_ask(self, received: Received) -> FleetTold:
        """A request on ``rheo.fleet``."""
        message: FleetAsked | DrainWorker | CutPipeline = received.message
        if isinstance(message, DrainWorker):
            return await self._answer(self._drain(message), message.worker)
        if isinstance(message, CutPipeline):
            if all(p.name != message.pipeline for p in self._fleet.pipelines(usable=False)):
                return FleetTold(error=f"there is no pipeline {message.pipeline}", refused=Refused.UNKNOWN)
            return await self._answer(self._recutter.cut(message.pipeline, message.cuts))
        if message.worker and self._worker(message.worker) is None:
            return FleetTold(error=f"there is no worker {message.worker}", refused=Refused.UNKNOWN)
        return self.told(message.worker)

    async def _answer(self, work: Awaitable[None], worker: str = "") -> FleetTold:
        try:
            await work
        except CutsError as error:
            return FleetTold(error=str(error), refused=Refused.INVALID)
        except LookupError as error:
            return FleetTold(error=str(error.args[0]), refused=Refused.UNKNOWN)
        except RefusedError as error:
            refused = Refused.NOT_NOW if error.retry_after_s > 0 else Refused.CONFLICT
            return FleetTold(error=str(error), refused=refused, retry_after_s=error.retry_after_s)
        return self.told(worker)

    def told(self, worker: str = "") -> FleetTold:
        """How things stand."""
        members = [m for m in self._fleet.members.values() if m.beat.service == "worker"]
        pipelines = self._fleet.pipelines(usable=False)
        if worker:
            members = [m for m in members if m.beat.instance == worker]
            pipelines = [p for p in pipelines if worker in p.workers]
        return FleetTold(
            workers=tuple(self._view(m) for m in sorted(members, key=lambda m: m.beat.instance)),
            pipelines=tuple(self._pipeline_view(p) for p in pipelines),
        )

    def _worker(self, instance: str) -> Member | None:
        member = self._fleet.members.get(instance)
        return member if member is not None and member.beat.service == "worker" else None

    def _state(self, member: Member) -> WorkerState:
        if member.lost:
            return WorkerState.LOST
        if self._fleet.is_draining(member.beat):
            left = self._streams(member.beat.pipeline)
            return WorkerState.DRAINING if left else WorkerState.DRAINED
        return WorkerState.READY if member.beat.ready else WorkerState.LOADING

    def worker_states(self) -> dict[str, int]:
        """How many workers are in which state. One that was drained and then stopped is not lost: it is not there."""
        members = [
            member
            for member in self._fleet.members.values()
            if member.beat.service == "worker" and not (member.lost and self._fleet.is_draining(member.beat))
        ]
        return dict(Counter(self._state(member).value for member in members))

    def _view(self, member: Member) -> WorkerView:
        beat, state = member.beat, self._state(member)
        blocks = self._fleet.blocks_of(beat)
        streams = self._streams(beat.pipeline)
        stuck = {r.stream: self._stuck[r.stream] for r in streams if r.stream in self._stuck}
        return WorkerView(
            instance=beat.instance,
            state=state,
            pipeline=beat.pipeline,
            stage=beat.stage,
            roles=beat.roles,
            model=beat.model,
            blocks=(blocks.start, blocks.stop - 1) if blocks else (),
            streams=tuple(sorted(r.stream for r in streams)),
            busy=beat.busy,
            memory_free=beat.memory_free,
            role_ms=beat.role_ms,
            stuck=stuck if state is WorkerState.DRAINING else {},
        )

    def _pipeline_view(self, pipeline: Pipeline) -> PipelineView:
        core, state = self._desk.cores.get(pipeline.name), self._recutter.of(pipeline.name).state
        return PipelineView(
            name=pipeline.name,
            model=pipeline.model,
            workers=pipeline.workers,
            draining=pipeline.draining,
            layers=self._recutter.layers(pipeline),
            cuts=cuts_of(pipeline.blocks) if pipeline.blocks else (),
            generation=core.generation if core is not None else 0,
            streams=tuple(sorted(record.stream for record in self._streams(pipeline.name))),
            load=self.load(pipeline),
            stage_busy=self._busy(pipeline),
            moving=state.phase.value,
            last_move=state.last,
        )

    # --- draining ----------------------------------------------------------------------------------------------------

    async def take_over(self) -> None:
        """What a former leader was emptying is still to be emptied. Raises StoreError."""
        store = self._desk.store
        for place in await store.notes(DRAIN_PLACE):
            incarnation = await store.get_note(place)
            if isinstance(incarnation, str):
                self._fleet.draining[place.removeprefix(DRAIN_PLACE)] = incarnation

    async def _drain(self, message: DrainWorker) -> None:
        member = self._worker(message.worker)
        if member is None:
            raise LookupError(f"there is no worker {message.worker}")
        place = DRAIN_PLACE + message.worker
        try:  # first of all: a scheduler that leads after this one must know what was answered
            if message.undo:
                await self._desk.store.drop_note(place)
            else:
                await self._desk.store.put_note(place, member.beat.incarnation, DRAIN_KEPT_S)
        except StoreError as error:
            raise RefusedError(f"it could not be written down: {error}", DRAIN_RETRY_S) from error
        if message.undo:
            self._fleet.draining.pop(message.worker, None)
            return
        self._fleet.draining[message.worker] = member.beat.incarnation
        log.info("worker %s is drained", message.worker)
        if message.force:
            for record in self._streams(member.beat.pipeline):
                try:
                    self.choose(record)
                except RefusedError as error:
                    await self._desk.fail(record.stream, f"worker {message.worker} is being stopped, and {error}")
        self._drained_at = 0.0

    async def tick(self) -> None:
        """Move streams away from what is being drained, as others have room. One at a time: each move is a pause."""
        now = self._clock.monotonic()
        busy = self._draining is not None and not self._draining.done()
        if busy or not self._fleet.draining or now - self._drained_at < DRAIN_RETRY_S:
            return
        self._drained_at = now
        self._draining = asyncio.create_task(self._move_away(), name="drain")

    async def _move_away(self) -> None:
        for pipeline in [p for p in self._fleet.pipelines(usable=False) if p.draining]:
            for record in self._streams(pipeline.name):
                if record.phase is not Phase.RUNNING:
                    continue
                try:
                    await self._migrator.migrate(record, self.choose(record))
                    self._stuck.pop(record.stream, None)
                except RefusedError as error:
                    self._stuck[record.stream] = str(error)
                    while len(self._stuck) > self._settings.max_streams * 64:
                        self._stuck.pop(next(iter(self._stuck)))

    async def close(self) -> None:
        """Stop acting."""
        if self._draining is not None:
            self._draining.cancel()
            await asyncio.gather(self._draining, return_exceptions=True)
