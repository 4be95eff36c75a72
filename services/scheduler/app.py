"""Builds, wires and drains the scheduler; holds the leader's lease."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import TextIO

from services.scheduler.core import PipelineCore
from services.scheduler.costs import CostBook
from services.scheduler.desk import StreamDesk
from services.scheduler.fleet import Fleet, Pipeline
from services.scheduler.handlers import Handlers
from services.scheduler.settings import Settings
from shared.contracts import subjects
from shared.lifecycle import Context, run_service
from shared.session.port import StoreError
from shared.session.state import TERMINAL_STATES
from shared.telemetry import names
from shared.telemetry.metrics import Metrics

log = logging.getLogger(__name__)
LEASE = "scheduler"
TICK_S = 0.05
REMEMBER_S = 10.0  # how often what work costs is kept, if it changed


class Scheduler:
    """One scheduler process: leader or standby."""

    def __init__(self, context: Context, settings: Settings) -> None:
        self._context = context
        self._settings = settings
        self._fleet = Fleet(settings.beat_timeout_s)
        self._term = 0
        self._leading = False
        self._tasks: list[asyncio.Task[None]] = []
        self._log_file: TextIO | None = None
        if settings.batch_log is not None:
            settings.batch_log.parent.mkdir(parents=True, exist_ok=True)
            self._log_file = settings.batch_log.open("a", encoding="utf-8")
        self._desk = StreamDesk(settings, context.bus, context.store, context.clock, self._fleet)
        self._desk.make_core = self._make_core
        self._costs = CostBook(context.store, settings.models_dir)
        self._desk.admitting.costs_of = self._costs.of
        self._handlers = Handlers(
            settings,
            context.bus,
            context.clock,
            self._fleet,
            self._desk,
            context.tensors,
            context.telemetry.tracer,
            self._log_file,
            self._costs,
        )
        self._desk.wire(self._handlers.pump, self._handlers.release)

    def _make_core(self, pipeline: Pipeline) -> PipelineCore:
        return PipelineCore(
            pipeline.name, pipeline.stages, self._term, self._costs.of(pipeline.name), self._settings.max_batch
        )

    async def start(self) -> None:
        """Beats are heard at once; commands only while leading."""
        bus = self._context.bus
        await bus.subscribe(subjects.beat(subjects.ANY), self._handlers.on_beat)
        self._tasks.append(asyncio.create_task(self._lead(), name="lead"))

    def beat_fields(self) -> dict[str, object]:
        """Ready means leading: a standby must not be counted as the scheduler."""
        return {"ready": self._leading, "streams": tuple(self._desk.records)}

    def declare(self, metrics: Metrics) -> None:
        """What the leader sees."""
        metrics.value(names.LEADING, lambda: float(self._leading))
        metrics.counts(names.STREAMS, "state", self._states)
        metrics.counts(names.WORKERS, "state", self._workers)
        metrics.counts(names.INCIDENTS, "incident", lambda: self._handlers.counters)
        for name, read in (
            (names.QUEUED, lambda core: core.queued),
            (names.IN_FLIGHT, lambda core: len(core.in_flight)),
            (names.BATCHES, lambda core: core.next_seq),
        ):
            metrics.read(name, partial(self._by_pipeline, read))
        metrics.read(names.COST_ERROR, self._cost_errors)

    def _workers(self) -> dict[str, int]:
        """Who stands by hears beats too, and finds nobody lost: it would count every worker a second time."""
        return self._handlers.operating.worker_states() if self._leading else {}

    def _states(self) -> dict[str, int]:
        return dict(Counter(record.phase.value for record in self._desk.records.values()))

    def _by_pipeline(self, read: Callable[[PipelineCore], float]) -> list[tuple[dict[str, str], float]]:
        return [({"pipeline": name}, read(core)) for name, core in list(self._desk.cores.items())]

    def _cost_errors(self) -> list[tuple[dict[str, str], float]]:
        cores = list(self._desk.cores.items())
        return [({"pipeline": name, "work": key}, e) for name, core in cores for key, e in core.cost.errors().items()]

    async def _lead(self) -> None:
        try:
            await self._lead_until_lost()
        except Exception as error:
            log.exception("leading ended")
            self._context.fail(f"cannot lead: {error}")

    async def _lead_until_lost(self) -> None:
        settings, store, holder = self._settings, self._context.store, self._context.instance
        term = await self._acquire()
        log.info("leading in term %d", term)
        bus, handlers = self._context.bus, self._handlers
        await bus.subscribe(subjects.pipeline_done(subjects.ANY), handlers.on_done, size=1024)
        await bus.subscribe(subjects.TAKEN, handlers.on_taken)
        await bus.subscribe(subjects.MOVED, self._desk.moves.on_moved)
        await bus.subscribe(subjects.stream(subjects.ANY, "motion"), handlers.on_motion, size=1024)
        await bus.subscribe(subjects.stream(subjects.ANY, "chunk"), handlers.on_chunk, size=1024)
        await bus.subscribe(subjects.stream(subjects.ANY, "closed"), handlers.on_closed, size=1024)
        await bus.subscribe(subjects.stream(subjects.ANY, "event"), handlers.on_event)
        self._term = term
        await self._handlers.operating.take_over()
        await self._take_over()
        await bus.subscribe(subjects.stream(subjects.ANY, "control"), handlers.on_control, durable="scheduler")
        await bus.serve(subjects.CAPACITY, handlers.on_capacity, group="capacity")
        self._tasks.append(asyncio.create_task(self._tick(), name="tick"))
        await bus.serve(subjects.FLEET, handlers.operating.on_ask)
        self._tasks.append(asyncio.create_task(self._remember(), name="remember"))
        self._leading = True
        clock = self._context.clock
        renewed = clock.monotonic()
        while clock.monotonic() - renewed < settings.lease_ttl_s:
            await clock.sleep(settings.lease_ttl_s / 3)
            try:
                if not await store.renew(LEASE, holder, term, settings.lease_ttl_s):
                    break
                renewed = clock.monotonic()
            except StoreError as error:
                log.warning("the lease was not renewed: %s", error)
        self._context.fail(f"the lease of term {term} is lost: another scheduler may lead")

    async def _acquire(self) -> int:
        settings = self._settings
        while True:
            try:
                term = await self._context.store.acquire(LEASE, self._context.instance, settings.lease_ttl_s)
                if term is not None:
                    return term
            except StoreError as error:
                log.warning("the lease cannot be asked for: %s", error)
            await self._context.clock.sleep(settings.lease_ttl_s / 6)

    async def _take_over(self) -> None:
        """Streams that a former leader left under way have lost their queues: end them, ledgers closed."""
        store = self._context.store
        left: list[tuple[str, dict[str, object]]] = []
        for stream in await store.streams():
            session = await store.get(stream)
            if session is not None and session.get("state") not in TERMINAL_STATES:
                left.append((stream, session))
        for stream, session in left:
            self._tasks.append(asyncio.create_task(self._desk.adopt_lost(stream, session), name=f"end {stream}"))

    async def _tick(self) -> None:
        while True:
            try:
                await self._handlers.tick()
            except Exception:
                log.exception("a tick failed")
            await self._context.clock.sleep(TICK_S)

    async def _remember(self) -> None:
        while True:
            await self._context.clock.sleep(REMEMBER_S)
            await self._costs.save()

    async def drain(self, deadline_s: float) -> None:
        """No new streams; batches under way finish by themselves. The lease is given up at once for a standby."""
        if self._term:
            await self._costs.save()
            await self._context.store.release(LEASE, self._context.instance, self._term)

    async def close(self) -> None:
        """Stop acting."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._handlers.close()
        if self._log_file is not None:
            self._log_file.close()


def main() -> None:
    """Run the service until it is told to stop."""
    settings = Settings()
    run_service("scheduler", settings, lambda context: Scheduler(context, settings))
