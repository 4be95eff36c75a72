"""A simulated pipeline: the scheduler's own core, and synthetic workers that carry out what it decides."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from services.scheduler.balancing import StageMeter
from services.scheduler.batching import NEVER_NS
from services.scheduler.core import Decisions, PipelineCore
from services.scheduler.simulator.clock import NS_PER_MS, NS_PER_S, VirtualClock
from services.scheduler.simulator.sessions import Session
from services.scheduler.simulator.workers import Rank, Worker
from services.scheduler.stream_queue import Offer
from shared.contracts.events import BatchDone, ChunkStamp, ItemResult, MotionEstimated, StageBatch, StageTiming
from shared.contracts.refs import TensorPlace, TensorRef
from shared.contracts.timing import timing_of
from shared.contracts.unchecked import unchecked
from shared.engine.plan.devices import LayerTimes
from shared.engine.plan.spec import ModelSpec

BUS_NS = 300_000  # one hop of the bus: docs/benchmarks.md
REF = TensorRef(owner="sim", host="sim", place=TensorPlace.LOCAL, shape=(1,), dtype="float32")
CALIBRATED_ITEMS = (1, 2, 4, 8)


@dataclass(slots=True)
class _Run:
    """A batch on its way through the stages."""

    batch: StageBatch
    frames: int  # latent frames of its forward
    deadline_ns: int
    ms: list[float]
    stage: int = 0


class SimPipeline:
    """``workers`` by stage; ``cuts`` are the first blocks of the stages 1…S−1. Sessions come by :meth:`take`."""

    def __init__(
        self, core: PipelineCore, clock: VirtualClock, workers: Sequence[Worker], times: LayerTimes, cuts: Sequence[int],
        spec: ModelSpec, tokens: int, hop_ms: float,
    ) -> None:  # fmt: skip
        self.core, self.workers, self.times, self.spec, self.tokens = core, list(workers), times, spec, tokens
        self.name = core.pipeline
        self.sessions: dict[str, Session] = {}
        self.held = False  # no batch leaves: blocks are moving, or the pipeline is gone
        self.left: Callable[[Session], None] = lambda _: None
        self.batches = self.items = 0
        self._told = 0
        self._pending = 0  # blocks that may run: offered and not in a batch, or between two steps
        self.encode_ms = self.decode_ms = 0.0
        self.meter: StageMeter | None = None
        self.clock = clock
        self._hop_ns = int(hop_ms * NS_PER_MS)
        self._timer_ns = 0
        self._noise = (spec.noise.s0, int(1000 * spec.noise.s0) - spec.noise.first_step_margin)
        self.blocks: list[int] = []
        self.cut(cuts)

    def cut(self, cuts: Sequence[int]) -> None:
        """The stages hold other blocks from now on."""
        self.cuts = tuple(cuts)
        self.blocks = [after - before for before, after in pairwise([0, *cuts, self.spec.layers])]

    def calibrate(self) -> None:
        """What a worker measures when it joins: each stage at a grid of sizes, encoding and decoding."""
        cost, tokens = self.core.cost, self.tokens
        for stage, worker in enumerate(self.workers):
            grid = [(n, float(n * tokens), self.stage_ms(stage, n) * worker.slow) for n in CALIBRATED_ITEMS]
            cost.seed(f"stage.{stage}", grid)
        cost.seed("encode", [(1, float(tokens), self.times.encode_ms * self.workers[0].slow)])
        cost.seed("decode", [(1, float(tokens), self.times.decode_ms * self.workers[-1].slow)])

    def stage_ms(self, stage: int, frames: float) -> float:
        """The profile's time for one forward of a stage over ``frames`` latent frames."""
        return self.blocks[stage] * (self.times.block_fixed_ms + self.times.block_ms * frames)

    # --- sessions ----------------------------------------------------------------------------------------------------

    def take(self, session: Session) -> None:
        """A session is placed here."""
        self.sessions[session.name] = session
        session.pipeline = self

    def leave(self, session: Session) -> None:
        """A session has ended, or moves away."""
        if self.sessions.pop(session.name, None) is not None:
            queue = self.core.streams[session.name]
            self._pending -= len(queue.waiting) + len(queue.later)
            self.core.remove(session.name)
            self.left(session)
            session.pipeline = None

    # --- the way of a chunk ------------------------------------------------------------------------------------------

    def encode(self, session: Session, stamp: ChunkStamp) -> None:
        """ingest → worker:encode."""
        ms = self.times.encode_ms if stamp.chunk else 2 * self.times.encode_ms
        first = self.workers[0]
        if not first.alive:
            session.lose(stamp.chunk, "egress:lost")
            return
        first.submit(Rank.ENCODE, stamp.frames[0].deadline_ns, ms, self._encoded, stamp)

    def _encoded(self, stamp: ChunkStamp, took: float) -> None:
        """worker:encode → motion → scheduler."""
        if stamp.chunk:
            self.encode_ms = took
        if self.meter is not None:  # whether or not it can enter a step 0: that is what encode is busy with
            self.meter.encoded += 1 if stamp.chunk else 2
        self.clock.at(self.clock.now + 2 * BUS_NS, self._offer, (stamp, took))

    def _offer(self, encoded: tuple[ChunkStamp, float]) -> None:
        stamp, took = encoded
        noise, first = self._noise
        chunk = unchecked(
            MotionEstimated,
            {
                "kind": "motion_estimated", "stamp": stamp, "latents": REF, "latent_frames": 1 if stamp.chunk else 2,
                "motion": 0.0, "noise_scale": noise, "first_timestep": first, "timings": self._timings(took),
                "noise_version": 0,
            },
        )  # fmt: skip
        offer, decisions = self.core.offer(chunk, self.clock.now)
        self._pending += offer is Offer.TAKEN
        if decisions.drops:
            self._act(decisions)
        self.pump()

    def _timings(self, took: float) -> tuple[StageTiming, ...]:
        """Every fourth chunk tells how long its encoding took: enough for a model, and learning is not free."""
        self._told += 1
        return (timing_of("encode", 0, 0, 0, took),) if self._told % 4 == 1 else ()

    def pump(self) -> None:
        """Schedule now, if a batch may leave; else when the next one may."""
        core, now = self.core, self.clock.now
        # Without anything to run the core would find nothing to send, and nothing to drop.
        if self.held or self._pending <= 0 or len(core.in_flight) > core.stages:
            return
        at = core.dispatch_at_ns()
        if now < at:
            if at != self._timer_ns:
                self._timer_ns = at
                self.clock.at(at, self._wake, at)
            return
        decisions = core.schedule(now)
        for batch in decisions.batches:
            frames, nearest = 0, NEVER_NS
            for entry in batch.entries:
                item, stamps = entry.item, entry.stamps
                frames += item.forward_frames
                nearest = min(nearest, stamps[0].frames[0].deadline_ns)
                self._pending -= len(stamps) if item.step == 0 else 1
            self.batches += 1
            self.items += len(batch.entries)
            self.clock.at(now + BUS_NS, self._stage, _Run(batch, frames, nearest, []))
        if decisions.drops:
            self._act(decisions)
        if (
            self._pending > 0
            and len(core.in_flight) <= core.stages
            and (at := core.dispatch_at_ns()) > now
            and at != self._timer_ns
        ):
            self._timer_ns = at
            self.clock.at(at, self._wake, at)

    def _wake(self, at: int) -> None:
        if at == self._timer_ns:
            self._timer_ns = 0
            self.pump()

    def _stage(self, run: _Run) -> None:
        if run.batch.generation != self.core.generation:
            return
        stage = run.stage
        self.workers[stage].submit(Rank.STAGE, run.deadline_ns, self.stage_ms(stage, run.frames), self._staged, run)

    def _staged(self, run: _Run, took: float) -> None:
        run.ms.append(took)
        run.stage += 1
        now = self.clock.now
        if run.stage < self.core.stages:
            self.clock.at(now + self._hop_ns, self._stage, run)
            return
        if run.batch.generation != self.core.generation:
            return
        decoder = self.workers[-1]
        for entry in run.batch.entries:
            if entry.item.is_last_step:
                ms = self.times.decode_ms * entry.item.frames
                decoder.submit(Rank.DECODE, entry.stamps[0].frames[0].deadline_ns, ms, self._decoded, entry.stamps)
        self.clock.at(now + BUS_NS, self._done, run)

    def _decoded(self, stamps: tuple[ChunkStamp, ...], took: float) -> None:
        self.decode_ms = took / len(stamps)
        for stamp in stamps:
            session = self.sessions.get(stamp.stream)
            if session is not None:
                session.ready(stamp.chunk, self.clock.now + BUS_NS)

    def _done(self, run: _Run) -> None:
        batch = run.batch
        results = tuple([
            unchecked(
                ItemResult,
                {
                    "stream": item.stream, "epoch": item.epoch, "block": item.block, "step": item.step,
                    "output": None if item.is_last_step else REF,
                },
            )
            for item in [entry.item for entry in batch.entries]
        ])  # fmt: skip
        done = unchecked(
            BatchDone,
            {
                "kind": "batch_done", "pipeline": self.name, "generation": batch.generation, "seq": batch.seq,
                "results": results, "stage_ms": tuple(run.ms), "timings": (),
            },
        )  # fmt: skip
        if self.meter is not None:
            finished = sum([len(entry.stamps) for entry in batch.entries if entry.item.is_last_step])
            self.meter.batch(self.clock.now / NS_PER_S, run.frames * self.tokens, run.ms, finished)
        if batch.generation == self.core.generation:
            self._pending += sum([result.output is not None for result in results])
        self.core.done(done, self.clock.now)
        self.pump()

    # --- control -----------------------------------------------------------------------------------------------------

    def beat(self) -> None:
        """What comes with a worker's heartbeat: how long decoding takes."""
        if self.encode_ms and self.decode_ms:
            self.core.cost.observe("decode", self.tokens, self.decode_ms)
            if self.meter is not None:
                now_s = self.clock.now / NS_PER_S
                self.meter.role("encode", self.encode_ms, now_s)
                self.meter.role("decode", self.decode_ms, now_s)

    def fault(self, reason: str) -> None:
        """The pipeline is rebuilt: a new generation, every slot empty."""
        self._timer_ns = 0
        self._act(self.core.fault(reason))
        self._pending = sum(len(queue.waiting) for queue in self.core.streams.values())

    def _act(self, decisions: Decisions) -> None:
        for drop in decisions.drops:
            self._pending -= drop.reason == "stale"
            session = self.sessions.get(drop.stamp.stream)
            if session is not None:
                session.drop(drop.stamp.chunk, f"{drop.service}:{drop.reason}")
