"""The life of a stream: start, change, stop, fail. Acts on what the cores decide; every step is told as an event."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager, nullcontext

from services.scheduler.admitting import Admitting
from services.scheduler.changing import Changing
from services.scheduler.core import PipelineCore
from services.scheduler.cost_model import CostModel
from services.scheduler.fleet import Fleet, Pipeline
from services.scheduler.messenger import Messenger, RefusedError, all_of, tell_refused
from services.scheduler.moves import Moves
from services.scheduler.placing import place
from services.scheduler.prompting import Prompting
from services.scheduler.records import Phase, StreamRecord
from services.scheduler.recovering import Recovering
from services.scheduler.resizing import Resizing
from services.scheduler.settings import Settings
from services.scheduler.sinking import Sinking
from services.scheduler.stream_queue import StreamQueue, StreamSettings
from services.scheduler.suspending import Suspending
from services.scheduler.tiering import Tiering
from shared.bus.port import Bus
from shared.clock import Clock
from shared.contracts.commands import (
    Mode,
    NoSource,
    StartStream,
    StreamSpec,
)
from shared.contracts.events import EventKind, StreamEvent
from shared.contracts.refs import TensorRef
from shared.engine.plan.registry import model_spec
from shared.engine.plan.stream_plan import StreamPlan
from shared.session.port import NoSuchStreamError, SessionStore, StreamExistsError
from shared.session.state import IllegalMoveError, Owner, StreamState

log = logging.getLogger(__name__)


class StreamDesk:
    """Starts, changes and ends streams. One per scheduler; ``pump`` asks the service to schedule now."""

    def __init__(self, settings: Settings, bus: Bus, store: SessionStore, clock: Clock, fleet: Fleet) -> None:
        self._settings = settings
        self._store = store
        self._clock = clock
        self._fleet = fleet
        self._pump: Callable[[], None] = lambda: None
        self._release: Callable[[list[TensorRef]], None] = lambda _: None
        self._messenger = Messenger(settings, bus, clock)
        self.answers = self._messenger.answers
        self.messenger, self.store = self._messenger, store
        self.tell = self._messenger.tell
        self.moves = Moves(bus, clock)
        self.suspending = Suspending(self.moves, settings.suspend_after_s)
        self.records: dict[str, StreamRecord] = {}
        self.cores: dict[str, PipelineCore] = {}
        self.opening: Callable[[str], AbstractAsyncContextManager[None]] = lambda _: nullcontext()
        self.make_core: Callable[[Pipeline], PipelineCore] | None = None
        self.admitting = Admitting(settings, fleet, clock, lambda name: costs_of(self.cores, name))
        self.tiering = Tiering(store, self._messenger, clock, self.admitting, self.records, self.cores)
        self.sinking = Sinking(bus, store, self._messenger, self.records)
        self._prompting = Prompting(settings, bus, store, self._messenger, self.cores)
        self.recovering = Recovering(
            settings,
            store,
            clock,
            fleet,
            self._messenger,
            self._prompting,
            self.records,
            self.cores,
            self.admitting.admission.loads,
        )
        resizing = Resizing(
            store,
            clock,
            self._messenger,
            self._prompting,
            self.tiering,
            self.admitting,
            self.recovering,
            self.cores,
            lambda pipeline: self.opening(pipeline),
            lambda refs: self._release(refs),
            lambda: self._pump(),
        )
        self.changing = Changing(
            store,
            self._messenger,
            self._prompting,
            self.tiering,
            self.suspending,
            self.records,
            self.cores,
            lambda: self._pump(),
            resizing,
        )
        self.update = self.changing.update

    def wire(self, pump: Callable[[], None], release: Callable[[list[TensorRef]], None]) -> None:
        """``pump`` schedules on every pipeline, soon; ``release`` gives back tensors that nobody will read."""
        self._pump, self._release = pump, release
        self.recovering.wire(self.fail, self.core_of, pump, release)

    # --- start -------------------------------------------------------------------------------------------------------

    async def start(self, command: StartStream) -> None:
        """Place a new stream, prepare everything behind it, then open its source. Answers accepted or refused."""
        stream = command.stream
        try:
            if stream in self.records:
                raise RefusedError(f"stream {stream} exists already")
            record, pipeline = place(command, self._fleet, self.admitting.admit, self._settings.models_dir)
            self.records[stream] = record  # the id and its room are taken from here on, before anything is awaited
        except RefusedError as error:
            await tell_refused(self._messenger, stream, command.command, error)
            return
        try:
            async with self.opening(pipeline.name):  # not while its blocks change hands
                await self._open(record, pipeline, command)
        except StreamExistsError as error:
            self.records.pop(stream, None)  # it is another leader's: nothing of it is touched
            self.admitting.leave(stream)
            await self.tell(stream, EventKind.REFUSED, reason=str(error), command=command.command)
        except Exception as error:
            reason = str(error) if isinstance(error, RefusedError) else f"{type(error).__name__}: {error}"
            log.info("stream %s refused: %s", stream, reason, exc_info=not isinstance(error, RefusedError))
            await self._let_go(record, drain=False, failure=reason, egress=True)
            record.failure = record.failure or reason
            await self._ended(record, StreamState.FAILED)
            await self.tell(stream, EventKind.REFUSED, reason=reason, command=command.command)

    async def _open(self, record: StreamRecord, pipeline: Pipeline, command: StartStream) -> None:
        stream, spec = record.stream, record.spec
        former = await self._store.get(stream)
        # An id may be used again: messages of its former life must not match.
        record.epoch = record.since_epoch = 1 if former is None else int(former.get("epoch", 0)) + 1
        await self._store.create(stream, spec)
        promised = None if record.promise is None else record.promise.model_dump()
        await self._store.put(
            stream,
            Owner.SCHEDULER,
            {"assignment": record.assignment(), "epoch": record.epoch, "promise": promised},
        )
        await all_of(
            *(self._messenger.take("worker", record, worker) for worker in record.workers),
            self._messenger.take("motion", record, record.motion, wait=False),
            self._messenger.take("egress", record, record.egress),
        )
        _still_opening(record)
        version = await self._prompting.prepare(record, spec.prompt)
        _still_opening(record)
        self._enqueue(record, pipeline, version)
        await self._messenger.take("ingest", record, record.ingest)
        _still_opening(record)
        record.move(Phase.RUNNING)
        await self._move(stream, StreamState.LIVE)
        await self.changing.keep_settings(record, self.changing.queue_of(record).settings)
        promise = record.promise
        await self.tell(stream, EventKind.ACCEPTED, command=command.command, version=version, promise=promise)
        await self.tiering.settle(record)
        self._pump()

    def _enqueue(self, record: StreamRecord, pipeline: Pipeline, version: int) -> None:
        model = model_spec(record.spec.model, self._settings.models_dir)
        tier = self.tiering.begin(record, model)
        self.core_of(pipeline).add(
            StreamQueue(
                stream=record.stream,
                epoch=record.epoch,
                live=record.spec.mode is Mode.LIVE,
                height=record.height,
                width=record.width,
                model=model,
                plan=StreamPlan.for_model(record.stream, record.epoch, model),
                from_text=isinstance(record.spec.source, NoSource),
                skips=record.skip_similar > 0,
                settings=StreamSettings(
                    steps=tier.steps,
                    seed=record.spec.seed,
                    prompt_version=version,
                    frames_per_block=tier.frames_per_block,
                    max_frames_per_block=record.spec.max_frames_per_block or 0,
                ),
            )
        )

    def core_of(self, pipeline: Pipeline) -> PipelineCore:
        """A pipeline's core, made when it is first needed. Raises RefusedError while this scheduler does not lead."""
        if pipeline.name not in self.cores:
            if self.make_core is None:
                raise RefusedError("this scheduler is not the leader")
            self.cores[pipeline.name] = self.make_core(pipeline)
        return self.cores[pipeline.name]

    def pump(self) -> None:
        """Schedule on every pipeline, soon."""
        self._pump()

    # --- stop and fail -----------------------------------------------------------------------------------------------

    async def stop(self, stream: str, drain: bool, command: str = "") -> None:
        """Stop a stream; egress tells stopped once its ledger is closed."""
        record = self.records.get(stream)
        if record is None or record.phase is Phase.ENDED:
            await self.tell(stream, EventKind.REFUSED, reason=f"stream {stream} is not running", command=command)
            return
        if command:
            await self.tell(stream, EventKind.ACCEPTED, command=command)
        if record.phase is Phase.OPENING:
            record.move(Phase.STOPPING)  # what is opening it sees that, and lets everything go
            return
        if record.phase is not Phase.STOPPING:
            record.move(Phase.STOPPING)
            await self._move(stream, StreamState.STOPPING)
        await self._messenger.leave("ingest", record, record.ingest, drain, None)
        if not drain:
            self._dequeue(record)
            await self._clock.sleep(0.3)  # let the source's totals reach egress first
            await self._messenger.leave("egress", record, record.egress, drain, None)

    async def fail(self, stream: str, reason: str) -> None:
        """End a stream that lost something it cannot do without. Egress closes the ledger and tells failed."""
        record = self.records.get(stream)
        if record is None or record.phase is Phase.ENDED or record.failure is not None:
            return
        log.warning("stream %s fails: %s", stream, reason)
        record.failure = reason
        if record.phase is Phase.OPENING:
            record.move(Phase.STOPPING)
            return
        if record.phase is not Phase.STOPPING:
            record.move(Phase.STOPPING)
            await self._move(stream, StreamState.STOPPING)
        self._dequeue(record)
        await self._messenger.leave("ingest", record, record.ingest, False, reason)
        await self._clock.sleep(0.3)
        if not await self._alive_again(record.egress):
            other = self._fleet.pick("egress")
            if other is None:  # nobody can close its ledger: it ends without
                await self._let_go(record, drain=False, failure=reason, egress=True)
                await self._ended(record, StreamState.FAILED)
                await self.tell(stream, EventKind.FAILED, reason=reason)
                return
            record.egress = other
        await self._messenger.leave("egress", record, record.egress, False, reason)

    async def adopt_lost(self, stream: str, session: dict[str, object]) -> None:
        """A stream that another leader left behind: its queues are gone, so end it, with its ledger closed."""
        assignment = session.get("assignment")
        spec = session.get("spec")
        if not isinstance(assignment, dict) or not isinstance(spec, StreamSpec):
            await self._move(stream, StreamState.FAILED)
            return
        record = StreamRecord(
            stream=stream,
            epoch=int(assignment["epoch"]),
            spec=spec,
            width=assignment["width"],
            height=assignment["height"],
            noise=assignment["noise"],
            pipeline=assignment["pipeline"],
            workers=tuple(assignment["workers"]),
            ingest=assignment["ingest"],
            egress=assignment["egress"],
            motion=assignment["motion"],
            phase=Phase.RUNNING,  # nobody is opening it, whatever its state says
        )
        self.records[stream] = record
        await self.fail(stream, "the scheduler was restarted")

    async def on_ended(self, event: StreamEvent) -> None:
        """Egress closed the ledger: everyone lets go."""
        record = self.records.get(event.stream)
        if record is None or record.phase is Phase.ENDED or not record.tells(event.epoch):
            return
        if record.failure is None and event.event is EventKind.FAILED:
            record.failure = event.reason
        self._dequeue(record)
        await self._let_go(record, drain=False, failure=None, egress=False)
        # Whoever heard that it ended may ask for its room at once: workers have been told, the store may take its time.
        self.admitting.leave(record.stream)
        await self._ended(record, StreamState.FAILED if event.event is EventKind.FAILED else StreamState.STOPPED)

    async def _ended(self, record: StreamRecord, state: StreamState) -> None:
        self._dequeue(record)
        if record.phase is Phase.ENDED:
            return
        record.move(Phase.ENDED)
        if record.failure:
            with contextlib.suppress(NoSuchStreamError):
                await self._store.put(record.stream, Owner.SCHEDULER, {"reason": record.failure})
        if record.failure is not None or state is StreamState.FAILED:
            await self._move(record.stream, StreamState.STOPPING, StreamState.FAILED)
        else:
            await self._move(record.stream, StreamState.STOPPING, StreamState.STOPPED)
        self.records.pop(record.stream, None)
        self.admitting.leave(record.stream)

    def _dequeue(self, record: StreamRecord) -> None:
        self.tiering.end(record)
        core = self.cores.get(record.pipeline)
        if core is not None:
            self._release(core.remove(record.stream))

    async def _let_go(self, record: StreamRecord, drain: bool, failure: str | None, egress: bool) -> None:
        await self._messenger.leave("ingest", record, record.ingest, drain, failure)
        for worker in record.workers:
            await self._messenger.leave("worker", record, worker, drain, failure)
        await self._messenger.leave("motion", record, record.motion, drain, failure)
        if egress:
            await self._messenger.leave("egress", record, record.egress, drain, failure)

    async def _alive_again(self, instance: str, timeout_s: float = 15.0) -> bool:
        until = self._clock.monotonic() + timeout_s
        while not self._fleet.alive(instance) and self._clock.monotonic() < until:
            await self._clock.sleep(0.1)
        return self._fleet.alive(instance)

    async def _move(self, stream: str, *states: StreamState) -> None:
        for state in states:
            try:
                await self._store.move(stream, state)
            except (IllegalMoveError, LookupError) as error:
                log.debug("stream %s: %s", stream, error)


def costs_of(cores: Mapping[str, PipelineCore], pipeline: str) -> CostModel:
    """What is known of a pipeline's costs: nothing, before it has run anything."""
    core = cores.get(pipeline)
    return CostModel() if core is None else core.cost


def _still_opening(record: StreamRecord) -> None:
    """Raises RefusedError when the stream was stopped, or lost a service, while it was being opened."""
    if record.phase is not Phase.OPENING:
        raise RefusedError(record.failure or "stopped before it started")
