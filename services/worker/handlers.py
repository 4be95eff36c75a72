"""Messages in, device jobs through, messages out. Orders and epochs are checked here; the device never waits for I/O."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import torch

from services.worker.assignments import LIVE_TTL_S, LOSSLESS_TTL_S, Assignments, Placed, one_line
from services.worker.calibration import Measured, units_of
from services.worker.core import BatchSequencer, Rank, Role, SequenceVerdict
from services.worker.device_thread import DeviceThread, Outcome, QueueFullError
from services.worker.fencing import Lives, StaleError, is_stale
from services.worker.messages import decoded, encoded, is_passed_by, passed_by, way_until
from services.worker.moving import Moving
from services.worker.outbox import Outbox
from services.worker.reports import Reports
from services.worker.roles.stage import StageOutput
from services.worker.runtime import Runtime
from services.worker.threads import Threads
from services.worker.transfer import publish_local, publish_shared, receive
from shared.bus.port import Received, Subscription
from shared.contracts import subjects
from shared.contracts.events import (
    BatchDone,
    BatchEntry,
    ChunkCaptured,
    ChunkStamp,
    ItemResult,
    LatentsDenoised,
    PipelineFault,
    StageBatch,
    StageTiming,
)
from shared.contracts.order import Arrival, OrderGate
from shared.contracts.refs import TensorRef
from shared.contracts.timing import ended_ns
from shared.engine.plan.spec import VAE_STRIDE
from shared.lifecycle import Context
from shared.tensors.port import TensorError

log = logging.getLogger(__name__)

FAULT_REPEAT_S = 0.5


class Handlers:
    """One worker's messages."""

    def __init__(
        self, context: Context, runtime: Runtime, device: DeviceThread, threads: Threads | None = None
    ) -> None:
        self._context = context
        self._bus = context.bus
        self._tensors = context.tensors
        self._runtime = runtime
        self._device = device
        self._threads = threads or Threads(1)
        self._settings = runtime.settings
        self._outbox = Outbox()
        self._lives = Lives()
        self._sequencer = BatchSequencer()
        self._fault_told_at = 0.0
        self.assignments = Assignments(context, runtime, device, self.on_chunk, self.on_denoised)
        self._batches: Subscription | None = None
        self._moving = Moving(context, runtime, device, self.assignments, lambda: self._sequencer, self._hear_batches)
        self.assignments.on_move = self._moving.on_move
        self.counters: dict[str, int] = {}
        self._reports = Reports(context, runtime, self._count)
        self.measured = Measured()

    async def start(self) -> None:
        """Subscribe to what concerns every stream; per-stream subjects follow with each assignment."""
        settings = self._settings
        await self._bus.subscribe(subjects.assign("worker"), self.assignments.on_assign)
        if Role.STAGE in settings.roles:
            await self._hear_batches()
        if Role.TEXT in settings.roles:
            await self._bus.serve(subjects.TEXT_ENCODE, self.assignments.on_text, group="text")
        self._outbox.start()

    async def _hear_batches(self) -> None:
        """Subscribe to the batches of this worker's place in the pipeline, and to no other's."""
        former, place = self._batches, self._runtime.place
        subject = subjects.pipeline_stage(place.pipeline, place.stage)
        self._batches = await self._bus.subscribe(subject, self.on_batch, size=64)
        if former is not None:
            await former.unsubscribe()

    @property
    def role_ms(self) -> dict[str, float]:
        """What each role's newest job took."""
        return self._reports.role_ms

    @property
    def generation(self) -> int:
        """The newest of the pipeline that this worker knows."""
        return self._sequencer.generation

    async def close(self) -> None:
        """Send what is finished, then stop."""
        await self._moving.close()
        await self._outbox.close()

    async def empty(self) -> None:
        """Let go of every stream, as after a start: whatever was under way comes to nothing."""
        self._lives.end()
        self._sequencer = BatchSequencer()
        self._moving.forget()
        self._device.forget(Rank.ENCODE, Rank.DECODE)
        await self.assignments.leave_all()
        self._count("fenced")

    # --- encode ------------------------------------------------------------------------------------------------------

    async def on_chunk(self, received: Received) -> None:
        """ChunkCaptured → latents."""
        message = received.message
        encode = self._runtime.encode
        if not isinstance(message, ChunkCaptured) or encode is None:
            return
        stamp = message.stamp
        placed = self._admit(stamp)
        if placed is None or not await self._in_order(placed.encode_gate, stamp):
            return
        if is_passed_by(placed.take):
            await self._bus.publish(subjects.stream(stamp.stream, "latents"), passed_by(message))
            return
        if is_stale(stamp, time.time_ns()):  # it waited while this worker or its inbox stood still
            await self._tensors.release_anywhere(message.pixels)
            await self._reports.drop(stamp, "stale")
            return
        try:
            pixels = await self._tensors.fetch(message.pixels)
            await self._tensors.release_anywhere(message.pixels)
        except TensorError as error:
            await self._reports.drop(stamp, f"pixels_gone: {error}")
            return

        def done(outcome: Outcome) -> None:
            took = self._reports.took("encode", (stamp,), outcome, stamp.published_ns)
            if outcome.error is not None:
                self._outbox.put(lambda: self._reports.dropped_by(outcome, stamp))
                return
            try:
                ref = self._latents_ref(outcome.value.latents, placed.waiting_ttl_s, local=self._is_stage(0))
            except TensorError as error:
                self._outbox.put(lambda reason=f"no_room: {error}": self._reports.drop(stamp, reason))
                return
            latents = encoded(message, outcome, ref, took)
            self._outbox.put(lambda: self._bus.publish(subjects.stream(stamp.stream, "latents"), latents))

        def run() -> object:
            if is_stale(stamp, time.time_ns()):
                raise StaleError
            return encode.run(stamp.stream, pixels)

        _, height, width, _ = pixels.shape
        work, shares = self._threads.within("encode", self._runtime.spec.tokens(width, height), run)
        await self._submit_or_drop(Rank.ENCODE, work, shares, done, stamp)

    # --- stage -------------------------------------------------------------------------------------------------------

    async def on_batch(self, received: Received) -> None:
        """StageBatch → the next stage, or x0 and BatchDone."""
        batch: StageBatch = received.message
        verdict, runnable, fresh = self._sequencer.arrive(batch, time.time_ns())
        self._count(f"batch_{verdict.value}")
        if fresh and self._runtime.stage is not None:
            self._submit(Rank.STAGE, self._runtime.stage.reset, lambda _: None)
        if verdict is SequenceVerdict.FULL:
            await self._fault(batch, f"stage {self._runtime.place.stage} waits for batch {self._sequencer.expected}")
        for ready in runnable:
            await self._run_batch(ready)

    async def watch_gaps(self) -> None:
        """A gap that does not fill is a pipeline fault (rule 1)."""
        sequencer = self._sequencer
        if sequencer.gap_age_ns(time.time_ns()) > self._settings.gap_timeout_s * 1e9:
            now = time.monotonic()
            if now - self._fault_told_at >= FAULT_REPEAT_S:  # told again until a new generation comes: it may be lost
                self._fault_told_at = now
                reason = f"batch {sequencer.expected} never came to stage {self._runtime.place.stage}"
                await self._tell_fault(sequencer.generation, sequencer.expected, reason)

    async def _run_batch(self, batch: StageBatch) -> None:
        role = self._runtime.stage
        if role is None:
            return
        items = [entry.item for entry in batch.entries]
        device = self._runtime.device
        try:
            activations: torch.Tensor | None = None
            parts: list[list[torch.Tensor]] = []
            if batch.activations is None:
                for entry in batch.entries:
                    parts.append([await receive(self._tensors, ref, device) for ref in entry.inputs])
            else:
                activations = await receive(self._tensors, batch.activations, device)
        except TensorError as error:
            await self._fault(batch, f"an input of batch {batch.seq} is gone: {error}")
            return

        def done(outcome: Outcome) -> None:
            after_ns = batch.timings[-1].end_ns if batch.timings else batch.scheduled_ns
            took = self._reports.batch_took(batch.entries, outcome, after_ns)
            if outcome.error is not None:
                log.error("batch %d failed", batch.seq, exc_info=outcome.error)
                self._outbox.put(lambda: self._fault(batch, one_line(outcome.error)))
                return
            passed = batch.model_copy(update={"timings": (*batch.timings, took)})
            self._outbox.put(lambda: self._try_pass_on(passed, outcome))

        def run() -> StageOutput:
            # On the device's own stream: nothing that a job reads may be made elsewhere.
            if activations is not None:
                return role.run(items, activations)
            size = (batch.height // VAE_STRIDE, batch.width // VAE_STRIDE)
            return role.run(items, [role.input_of(item, p, size) for item, p in zip(items, parts, strict=True)])

        units = items[0].frames * self._runtime.spec.tokens(batch.width, batch.height)
        work, shares = self._threads.within("stage", units, run)
        deadlines = [entry.stamps[0].frames[0].deadline_ns for entry in batch.entries if entry.stamps[0].live]
        try:
            self._device.submit(Rank.STAGE, work, self._lives.of_this(done), min(deadlines, default=0), shares)
        except QueueFullError as error:
            await self._fault(batch, str(error))

    async def _try_pass_on(self, batch: StageBatch, outcome: Outcome) -> None:
        try:
            await self._pass_on(batch, outcome.value, outcome)
        except TensorError as error:
            await self._fault(batch, f"the results of batch {batch.seq} found no room: {error}")

    async def _pass_on(self, batch: StageBatch, output: StageOutput, outcome: Outcome) -> None:
        stage_ms = (*batch.compute_ms, outcome.compute_ms)
        live = all(entry.stamps[0].live for entry in batch.entries)
        ttl_s = LIVE_TTL_S if live else LOSSLESS_TTL_S
        if output.activations is not None:
            ref = publish_shared(self._tensors, output.activations, ttl_s)
            onward = batch.model_copy(update={"activations": ref, "compute_ms": stage_ms})
            subject = subjects.pipeline_stage(batch.pipeline, self._runtime.place.stage + 1)
            await self._bus.publish(subject, onward)
            return
        results: list[ItemResult] = []
        for entry, latents in zip(batch.entries, output.latents, strict=True):
            item = entry.item
            again: TensorRef | None = None
            if item.is_last_step:
                await self._finish(entry, latents, ttl_s, batch)
            else:
                again = self._latents_ref(latents, ttl_s, local=self._is_stage(0))
            results.append(
                ItemResult(stream=item.stream, epoch=item.epoch, block=item.block, step=item.step, output=again)
            )
        report = BatchDone(
            pipeline=batch.pipeline,
            generation=batch.generation,
            seq=batch.seq,
            results=tuple(results),
            stage_ms=stage_ms,
            timings=batch.timings,
        )
        await self._bus.publish(subjects.pipeline_done(batch.pipeline), report)

    async def _finish(self, entry: BatchEntry, latents: torch.Tensor, ttl_s: float, batch: StageBatch) -> None:
        denoised = LatentsDenoised(
            stamps=entry.stamps,
            latents=self._latents_ref(latents, ttl_s, local=Role.DECODE in self._settings.roles),
            block=entry.item.block,
            steps=entry.item.steps,
            prompt_version=entry.item.prompt_version,
            timings=(*entry.timings, *batch.timings),
            arrived=entry.arrived,
        )
        await self._bus.publish(subjects.stream(entry.item.stream, "denoised"), denoised)

    async def _fault(self, batch: StageBatch, reason: str) -> None:
        await self._tell_fault(batch.generation, batch.seq, reason)

    async def _tell_fault(self, generation: int, seq: int, reason: str) -> None:
        self._count("faults")
        place = self._runtime.place
        fault = PipelineFault(pipeline=place.pipeline, stage=place.stage, generation=generation, seq=seq, reason=reason)
        await self._bus.publish(subjects.pipeline_done(place.pipeline), fault)

    # --- decode ------------------------------------------------------------------------------------------------------

    async def on_denoised(self, received: Received) -> None:
        """Clean latents → pixels, one FramesDecoded per chunk."""
        message: LatentsDenoised = received.message
        decode = self._runtime.decode
        placed = self._admit(message.stamps[0])
        if placed is None or decode is None:
            return
        fresh = [await self._in_order(placed.decode_gate, stamp) for stamp in message.stamps]
        if not all(fresh):
            return
        stream = message.stamps[0].stream
        try:
            latents = await receive(self._tensors, message.latents, self._runtime.device)
        except TensorError as error:
            for index, stamp in enumerate(message.stamps):
                await self._reports.drop(stamp, f"latents_gone: {error}", way_until(message, index))
            return

        def done(outcome: Outcome) -> None:
            took = self._reports.took("decode", message.stamps, outcome, ended_ns(message.stamps[-1], message.timings))
            if outcome.error is not None:
                for stamp in message.stamps:
                    self._outbox.put(lambda stamp=stamp: self._reports.dropped_by(outcome, stamp, message.timings))
                return
            if message.block:  # a stream's first touches its memory first: it says nothing of those that follow
                self.measured.add("decode", 1, units_of(message.latents.shape), outcome.compute_ms)
            self._outbox.put(lambda: self._publish_frames(message, placed, outcome, took))

        deadline = message.stamps[0].frames[0].deadline_ns if message.stamps[0].live else 0
        frames, units = sum(stamp.pixel_frames for stamp in message.stamps), units_of(message.latents.shape)
        work, shares = self._threads.within("decode", units, lambda: decode.run(stream, latents, frames))
        await self._submit_or_drop(Rank.DECODE, work, shares, done, *message.stamps, deadline_ns=deadline)

    async def _publish_frames(
        self, message: LatentsDenoised, placed: Placed, outcome: Outcome, took: StageTiming
    ) -> None:
        start = 0
        for index, stamp in enumerate(message.stamps):
            frames = outcome.value[start : start + stamp.pixel_frames]
            start += stamp.pixel_frames
            try:
                ref = self._tensors.put(frames, ttl_s=placed.ttl_s)
            except TensorError as error:
                await self._reports.drop(stamp, f"no_room: {error}")
                continue
            await self._bus.publish(subjects.stream(stamp.stream, "frames"), decoded(message, index, ref, took))

    # --- shared ------------------------------------------------------------------------------------------------------

    def _admit(self, stamp: ChunkStamp) -> Placed | None:
        placed = self.assignments.find(stamp)
        if placed is None:
            self._count("old_epoch")
        return placed

    async def _in_order(self, gate: OrderGate, stamp: ChunkStamp) -> bool:
        arrival = gate.arrive(stamp.chunk)
        if arrival is Arrival.NEW:
            return True
        self._count(f"chunk_{arrival.value}")
        if arrival is Arrival.OVERTAKEN:
            await self._reports.drop(stamp, "overtaken")
        return False

    def _is_stage(self, stage: int) -> bool:
        return Role.STAGE in self._settings.roles and self._runtime.place.stage == stage

    def _latents_ref(self, latents: torch.Tensor, ttl_s: float, local: bool) -> TensorRef:
        publish = publish_local if local else publish_shared
        return publish(self._tensors, latents, ttl_s)

    def _submit(self, rank: Rank, run: Callable[[], object], done: Callable[[Outcome], None]) -> None:
        try:
            self._device.submit(rank, run, done)
        except QueueFullError:
            self._count("queue_full")

    async def _submit_or_drop(
        self,
        rank: Rank,
        run: Callable[[], object],
        shares: bool,
        done: Callable[[Outcome], None],
        *stamps: ChunkStamp,
        deadline_ns: int | None = None,
    ) -> None:
        if deadline_ns is None:
            deadline_ns = stamps[0].frames[0].deadline_ns if stamps[0].live else 0
        try:
            self._device.submit(rank, run, self._lives.of_this(done), deadline_ns, shares)
        except QueueFullError:
            for stamp in stamps:
                await self._reports.drop(stamp, "queue_full")

    def _count(self, name: str) -> None:
        self.counters[name] = self.counters.get(name, 0) + 1
