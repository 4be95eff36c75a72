"""Messages in, decisions out. No decisions are made here: the cores and the desk make them."""

from __future__ import annotations

import asyncio
import json
import logging
from collections import OrderedDict
from typing import Any, TextIO

from services.scheduler.core import Decisions, PipelineCore
from services.scheduler.costs import CostBook
from services.scheduler.desk import StreamDesk
from services.scheduler.fleet import Fleet, Health
from services.scheduler.migrating import Migrator
from services.scheduler.operating import Operating
from services.scheduler.recutting import Recutter
from services.scheduler.settings import Settings
from services.scheduler.stream_queue import Applied
from services.scheduler.turns import Turns
from shared.bus.port import Bus, Received
from shared.clock import Clock
from shared.contracts import subjects
from shared.contracts.commands import StartStream, StopStream, UpdateStream
from shared.contracts.events import (
    BatchDone,
    Beat,
    EventKind,
    MotionEstimated,
    PipelineFault,
    PromptReady,
    SourceEnded,
    StageBatch,
    StreamEvent,
    StreamTaken,
)
from shared.contracts.operating import MigrateStream
from shared.contracts.refs import TensorRef
from shared.contracts.sinks import AddSink, RemoveSink
from shared.contracts.tiers import CapacityAsked, CapacityTold, Refusal
from shared.telemetry import names
from shared.telemetry.hops import record_hop
from shared.tensors.port import TensorReader

log = logging.getLogger(__name__)
MAX_REMEMBERED_COMMANDS = 1024
FLOOD_RETRY_S = 1.0


class Handlers:
    """Wires subjects to the desk and the pipeline cores."""

    def __init__(
        self,
        settings: Settings,
        bus: Bus,
        clock: Clock,
        fleet: Fleet,
        desk: StreamDesk,
        tensors: TensorReader,
        tracer: Any,
        batch_log: TextIO | None,
        costs: CostBook,
    ) -> None:
        self._settings = settings
        self._bus = bus
        self._clock = clock
        self._fleet = fleet
        self._desk = desk
        self._tensors = tensors
        self._tracer = tracer
        self._batch_log = batch_log
        self._costs = costs
        self._commands: OrderedDict[str, None] = OrderedDict()
        self._tasks: set[asyncio.Task[None]] = set()
        self._publishing: dict[str, asyncio.Lock] = {}
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._turns = Turns()
        self.counters: dict[str, int] = {}
        self.recutter = Recutter(settings, clock, fleet, desk, self._rebuild)
        self.migrator = Migrator(settings, clock, desk.store, fleet, desk, desk.messenger)
        self.operating = Operating(settings, clock, fleet, desk, self.recutter, self.migrator)

    # --- from the bus ------------------------------------------------------------------------------------------------

    async def on_control(self, received: Received) -> None:
        """start, update, stop: validated by their types; each command id is carried out once."""
        command: StartStream | UpdateStream | StopStream | MigrateStream | AddSink | RemoveSink = received.message
        if not subjects.is_token(command.stream) or subjects.stream_of(received.subject) != command.stream:
            self._count("control_wrong_subject")
            return
        if command.command in self._commands:
            self._count("control_repeated")
            return
        self._commands[command.command] = None
        while len(self._commands) > MAX_REMEMBERED_COMMANDS:
            self._commands.popitem(last=False)
        if isinstance(command, StartStream):
            await self._queue_start(command)
        elif isinstance(command, UpdateStream):
            self._spawn(self._desk.update(command))
        elif isinstance(command, MigrateStream):
            self._spawn(self.operating.migrate(command))
        elif isinstance(command, AddSink | RemoveSink):
            self._spawn(self._desk.sinking.change(command))
        elif (waiting := self._turns.withdraw(command.stream)) is not None:
            await self._desk.tell(command.stream, EventKind.ACCEPTED, command=command.command)
            reason = "stopped before it started"
            await self._desk.tell(command.stream, EventKind.REFUSED, reason=reason, command=waiting.command)
        else:
            self._spawn(self._desk.stop(command.stream, command.drain, command.command))

    async def _queue_start(self, command: StartStream) -> None:
        """Starts come in turn, tenant by tenant; whose tenant has too many waiting hears so at once."""
        if not self._turns.offer(command):
            self._count("start_flood")
            await self._desk.tell(
                command.stream,
                EventKind.REFUSED,
                reason=f"tenant {command.spec.tenant} has {self._turns.waiting} starts waiting: slow down",
                command=command.command,
                retry_after_s=FLOOD_RETRY_S,
                refusal=Refusal.QUOTA,
            )
        self._open_next()

    def _open_next(self) -> None:
        while (command := self._turns.next()) is not None:
            self._spawn(self._open(command))

    async def _open(self, command: StartStream) -> None:
        try:
            await self._desk.start(command)
        finally:
            self._turns.opened(command)
            self._open_next()

    async def on_motion(self, received: Received) -> None:
        """A chunk is ready to be scheduled."""
        chunk: MotionEstimated = received.message
        record = self._desk.records.get(chunk.stamp.stream)
        core = self._desk.cores.get(record.pipeline) if record is not None else None
        if core is None:
            self._count("motion_unknown_stream")
            return
        self.recutter.on_encoded(core, chunk)
        offer, decisions = core.offer(chunk, self._clock.now_ns())
        if record is not None and (queue := core.streams.get(chunk.stamp.stream)) is not None:
            self._desk.tiering.on_chunk(chunk.stamp, queue.model)
            pixels = queue.width * queue.height * chunk.stamp.pixel_frames
            self._desk.admitting.meter.chunk(record.workers, pixels)
        self._count(f"motion_{offer.value if offer is not None else 'unknown_stream'}")
        await self._act(decisions)
        await self.pump_core(core)

    async def on_chunk(self, received: Received) -> None:
        """Only the end of a source matters here: a last, shorter frame block need not wait."""
        message = received.message
        if isinstance(message, SourceEnded):
            record = self._desk.records.get(message.stream)
            core = self._desk.cores.get(record.pipeline) if record is not None else None
            queue = core.streams.get(message.stream) if core is not None else None
            if core is not None and queue is not None and not queue.ended:
                queue.ended = True
                await self.pump_core(core)

    async def on_done(self, received: Received) -> None:
        """What the stages report."""
        message: BatchDone | PipelineFault | PromptReady = received.message
        if isinstance(message, PromptReady):
            key = ("prompt", message.stream, str(message.epoch), str(message.version), str(message.stage))
            self._desk.answers.answer(message.error, *key)
            return
        core = self._desk.cores.get(message.pipeline)
        if core is None:
            return
        if isinstance(message, PipelineFault):
            if message.generation == core.generation:
                await self._rebuild(core, message.reason)
            return
        self.recutter.on_done(core, message)
        await self._act(core.done(message, self._clock.now_ns()))
        await self.pump_core(core)

    async def on_closed(self, received: Received) -> None:
        """Verdicts: what came late counts for the ladder."""
        self._desk.tiering.on_closed(received.message)

    async def on_taken(self, received: Received) -> None:
        """A service answered an assignment."""
        taken: StreamTaken = received.message
        record = self._desk.records.get(taken.stream)
        if taken.service == "ingest" and record is not None and taken.epoch == record.epoch:
            record.epoch_from = taken.chunk
        self._desk.answers.answer(taken.error, "taken", taken.instance, taken.stream, str(taken.epoch))

    async def on_capacity(self, received: Received) -> CapacityTold:
        """How many more streams would be let in."""
        asked: CapacityAsked = received.message
        return self._desk.admitting.capacity(asked)

    async def on_beat(self, received: Received) -> None:
        """A heartbeat. An instance that came back empty has lost its streams."""
        beat: Beat = received.message
        self.recutter.on_beat(beat)
        self._desk.admitting.meter.beat(beat, self._clock.monotonic())
        if self._fleet.beat(beat, self._clock.monotonic()) is Health.RETURNED:
            await self.lost(beat.instance, "was restarted")
        await self._costs.beat(beat)

    async def on_event(self, received: Received) -> None:
        """Egress tells that a stream's ledger is closed; ingest that its source failed."""
        event: StreamEvent = received.message
        if event.service == "egress" and event.event in (EventKind.STOPPED, EventKind.FAILED):
            await self._desk.on_ended(event)
        elif event.service == "egress" and event.gone:
            self._spawn(self._desk.sinking.on_gone(event))
        elif event.service == "ingest" and event.event is EventKind.FAILED:
            record = self._desk.records.get(event.stream)
            if record is None or not record.tells(event.epoch):
                return
            self._spawn(self._desk.fail(event.stream, event.reason))

    # --- from the clock ----------------------------------------------------------------------------------------------

    async def tick(self) -> None:
        """Lost instances, overdue batches, stale chunks; cuts that should move, workers that are emptied."""
        await self.recutter.tick()
        await self.operating.tick()
        # Without a broker nobody can be heard: the time until it is back counts for nobody (see ``newly_lost``).
        connected = getattr(self._bus, "connected", True)
        for instance in self._fleet.newly_lost(self._clock.monotonic()) if connected else ():
            await self.lost(instance, f"sent no heartbeat for {self._settings.beat_timeout_s} s")
        now = self._clock.now_ns()
        live, lossless = self._settings.batch_timeout_s, self._settings.lossless_batch_timeout_s
        for core in list(self._desk.cores.values()):
            overdue = core.overdue(now, int(live * 1e9), int(lossless * 1e9))
            if overdue is not None:
                await self._rebuild(core, f"batch {overdue} was not reported in time")
            await self.pump_core(core)
        await self._desk.tiering.tick()
        desk = self._desk
        for renewal in desk.recovering.without_motion():
            self._spawn(renewal)
        for record in desk.suspending.due(desk.records.values(), desk.cores, self._clock.monotonic()):
            self._spawn(desk.suspending.set_aside(record, desk.cores))

    async def lost(self, instance: str, how: str) -> None:
        """Live streams recover from a lost worker; else every stream that an instance held state of fails."""
        member = self._fleet.members.get(instance)
        if member is not None and member.beat.service == "motion":
            return  # it resumes from its mirror in the session store
        self._desk.moves.lost(instance, how)
        for record in list(self._desk.records.values()):
            if (work := self._desk.recovering.lost(record, instance, how)) is not None:
                self._spawn(work)
        if member is not None and member.beat.service == "worker":
            core = self._desk.cores.get(member.beat.pipeline)
            if core is not None:  # what the worker held is gone: batches are numbered anew for its next life
                await self._rebuild(core, f"{instance} {how}")

    def pump(self) -> None:
        """Schedule on every pipeline, soon."""
        for core in self._desk.cores.values():
            self._spawn(self.pump_core(core))

    async def pump_core(self, core: PipelineCore) -> None:
        """Schedule on one pipeline now. Its lock keeps batches on the wire in their sequence."""
        async with self._publishing.setdefault(core.pipeline, asyncio.Lock()):
            decisions = core.schedule(self._clock.now_ns())
            for batch in decisions.batches:
                await self._bus.publish(subjects.pipeline_stage(batch.pipeline, 0), batch)
                self._trace(batch)
                self._log(batch)
        await self._act(decisions)
        self._wake_for(core)

    def _wake_for(self, core: PipelineCore) -> None:
        """Schedule again when the next batch may leave, if nothing happens before."""
        timer = self._timers.pop(core.pipeline, None)
        if timer is not None:
            timer.cancel()
        wait_ns = core.dispatch_at_ns() - self._clock.now_ns()
        if wait_ns > 0:
            loop = asyncio.get_running_loop()
            self._timers[core.pipeline] = loop.call_later(wait_ns / 1e9, lambda: self._spawn(self.pump_core(core)))

    async def close(self) -> None:
        """Cancel what is under way."""
        for part in (self.operating, self.migrator, self.recutter):
            await part.close()
        for timer in self._timers.values():
            timer.cancel()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # --- acting ------------------------------------------------------------------------------------------------------

    async def _rebuild(self, core: PipelineCore, reason: str) -> None:
        log.warning("pipeline %s is rebuilt: %s", core.pipeline, reason)
        self._count("pipeline_faults")
        await self._act(core.fault(reason))
        for stream, queue in list(core.streams.items()):
            if queue.live:
                await self._desk.tell(stream, EventKind.WARNING, reason=f"the pipeline was rebuilt: {reason}")

    async def _act(self, decisions: Decisions) -> None:
        """Everything decided but the batches. What waits for an answer must not hold up the next decision."""
        self.release(decisions.released)
        for applied in decisions.applied:
            self._spawn(self._tell_applied(applied))
        for stream, reason in decisions.failed.items():
            self._spawn(self._desk.fail(stream, reason))
        for drop in decisions.drops:  # last: what is above is done even where the broker is away
            await self._bus.publish(subjects.stream(drop.stamp.stream, "frames"), drop)
            self._count(f"dropped_{drop.reason}")

    async def _tell_applied(self, applied: Applied) -> None:
        """A change took effect: a user's, or the ladder's."""
        if await self._desk.tiering.applied(applied):
            return
        await self._desk.tell(
            applied.stream,
            EventKind.APPLIED,
            command=applied.command,
            version=applied.version,
            chunk=applied.chunk,
            pts=applied.pts,
            until_chunk=applied.until,
        )

    def release(self, refs: list[TensorRef]) -> None:
        """Give back tensors that nobody will read."""
        if refs:
            self._spawn(self._release_all(refs))

    async def _release_all(self, refs: list[TensorRef]) -> None:
        for ref in refs:
            await self._tensors.release_anywhere(ref)

    def _trace(self, batch: StageBatch) -> None:
        for entry in batch.entries:
            step = {names.STEP: entry.item.step}
            for index, stamp in enumerate(entry.stamps):
                way = entry.timings or (entry.arrived[index] if index < len(entry.arrived) else ())
                if way:
                    record_hop(self._tracer, stamp, way[-1], extra=step)

    def _log(self, batch: StageBatch) -> None:
        if self._batch_log is None:
            return
        items = [
            {
                "stream": entry.item.stream,
                "block": entry.item.block,
                "step": entry.item.step,
                "steps": entry.item.steps,
                "chunks": [stamp.chunk for stamp in entry.stamps],
                "context": entry.item.context,
                "noise": entry.item.noise_scale,
                "seed": entry.item.seed,
                "prompt": entry.item.prompt_version,
                "blend": [entry.item.blend_version, entry.item.blend] if entry.item.blend else [],
            }
            for entry in batch.entries
        ]
        line = {"pipeline": batch.pipeline, "generation": batch.generation, "seq": batch.seq, "items": items}
        self._batch_log.write(json.dumps(line) + "\n")
        self._batch_log.flush()

    def _spawn(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(_logged(work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _count(self, name: str) -> None:
        self.counters[name] = self.counters.get(name, 0) + 1


async def _logged(work: Any) -> None:
    try:
        await work
    except asyncio.CancelledError:
        raise
    except Exception:
        log.exception("a command could not be carried out")
