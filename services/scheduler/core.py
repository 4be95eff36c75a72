"""The scheduler's decisions for one pipeline: what runs next, what can no longer make it, what a fault costs.

Pure and synchronous: ``schedule`` returns a plan, ``done`` and ``fault`` are told what happened; time is passed in. The
service and the simulator run the same code.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from services.scheduler.batching import choose
from services.scheduler.cost_model import CostModel
from services.scheduler.stream_queue import Applied, Offer, StreamQueue, Work
from shared.contracts.events import (
    BatchDone,
    BatchEntry,
    ChunkDropped,
    ChunkStamp,
    MotionEstimated,
    StageBatch,
    StageTiming,
)
from shared.contracts.refs import TensorRef

NS_PER_MS = 1_000_000
DISPATCH_LEAD_NS = 6 * NS_PER_MS  # how long before stage 0 is free the next batch leaves: more than the bus takes


@dataclass(slots=True)
class Decisions:
    """What the service must do now."""

    batches: list[StageBatch] = field(default_factory=lambda: list[StageBatch]())
    drops: list[ChunkDropped] = field(default_factory=lambda: list[ChunkDropped]())
    applied: list[Applied] = field(default_factory=lambda: list[Applied]())
    failed: dict[str, str] = field(default_factory=lambda: dict[str, str]())  # stream → one line
    released: list[TensorRef] = field(default_factory=lambda: list[TensorRef]())  # inputs nobody will read


@dataclass(frozen=True, slots=True)
class Flight:
    """A batch that stage 0 has been given and the last stage has not reported."""

    works: tuple[Work, ...]
    sent_ns: int
    units: int
    live: bool


class PipelineCore:
    """Queues, batches in flight and the pipeline's generation.

    ``stages`` is S; up to S+1 batches are in flight. ``latent_tokens(height, width)`` tokens make one latent frame.
    """

    def __init__(
        self, pipeline: str, stages: int, term: int, cost: CostModel, max_batch: int = 8, generation: int = 1
    ) -> None:
        self.pipeline = pipeline
        self.stages = stages
        self.term = term
        self.cost = cost
        self.max_batch = max_batch
        self.generation = generation
        self.next_seq = 0
        self.streams: dict[str, StreamQueue] = {}
        self.in_flight: dict[int, Flight] = {}
        self.holding = False  # nothing is dispatched: blocks are about to change hands
        self._stage0_free_ns = 0

    # --- streams -----------------------------------------------------------------------------------------------------

    def add(self, queue: StreamQueue) -> None:
        """A stream joins. Raises ValueError when it is here already."""
        if queue.stream in self.streams:
            raise ValueError(f"stream {queue.stream} is already on pipeline {self.pipeline}")
        self.streams[queue.stream] = queue

    def remove(self, stream: str) -> list[TensorRef]:
        """A stream leaves; batches that stage 0 admitted run whole (rule 6). Returns the inputs nobody will read."""
        queue = self.streams.pop(stream, None)
        return [] if queue is None else queue.inputs()

    def offer(self, chunk: MotionEstimated, now_ns: int) -> tuple[Offer | None, Decisions]:
        """A chunk is ready. The offer is None when its stream is not here."""
        decisions = Decisions()
        queue = self.streams.get(chunk.stamp.stream)
        if queue is None:
            return None, decisions
        offer = queue.offer(chunk, now_ns)
        if offer in (Offer.OVERTAKEN, Offer.FULL):
            self._drop(decisions, (chunk.stamp,), offer.value)
            decisions.released.append(chunk.latents)
        return offer, decisions

    # --- the plan ----------------------------------------------------------------------------------------------------

    def schedule(self, now_ns: int) -> Decisions:
        """Fill the pipeline: drop what can no longer make its deadline, then batch by slack up to S+1 in flight.

        A batch leaves just before stage 0 is predicted to be free, not earlier: what becomes ready meanwhile joins it.
        """
        decisions = Decisions()
        for queue in self.streams.values():
            self._drop_stale(queue, now_ns, decisions)
        while not self.holding and len(self.in_flight) <= self.stages and now_ns >= self.dispatch_at_ns():
            members = choose(self._candidates(), now_ns, self._remaining_ns, self._bucket, self.max_batch)
            if not members:
                break
            decisions.batches.append(self._send(members, now_ns, decisions))
        return decisions

    def dispatch_at_ns(self) -> int:
        """When the next batch may leave: at once for an idle pipeline, else just before stage 0 is free."""
        return self._stage0_free_ns - DISPATCH_LEAD_NS if self.in_flight else 0

    def done(self, done: BatchDone, now_ns: int) -> Decisions:
        """The last stage reported a batch: its credit is back, and blocks with steps left are ready again."""
        decisions = Decisions()
        if done.generation != self.generation:
            decisions.released.extend(result.output for result in done.results if result.output is not None)
            return decisions
        flight = self.in_flight.pop(done.seq, None)
        if flight is None:
            return decisions
        if self.stages == 1:  # the one stage is free now, but for what is in flight behind
            behind = sum(self.cost.predict("stage.0", other.units) for other in self.in_flight.values())
            self._stage0_free_ns = now_ns + int(behind * NS_PER_MS)
        for stage, ms in enumerate(done.stage_ms):
            self.cost.observe(f"stage.{stage}", flight.units, ms)
        outputs = {(result.stream, result.block, result.step): result.output for result in done.results}
        for work in flight.works:
            item = work.item
            if item is None:
                continue
            queue = self.streams.get(work.stream)
            output = outputs.get((item.stream, item.block, item.step))
            if queue is None or not queue.takes(item.epoch):
                if output is not None:
                    decisions.released.append(output)
                continue
            queue.plan.done(item)
            if output is not None:
                stage_ms = StageTiming(hop="stage", queue_ms=0.0, compute_ms=sum(done.stage_ms))
                queue.later[item.block] = replace(
                    work, inputs=(output,), ready_ns=now_ns, timings=(*work.timings, stage_ms)
                )
        return decisions

    def cut_over(self, factors: Mapping[int, float]) -> None:
        """Blocks changed hands while nothing was in flight: a new generation, whose slots are those of the one before.

        ``factors``: by stage, how many times as many blocks it has now.
        """
        if self.in_flight:
            raise ValueError(f"pipeline {self.pipeline} has {len(self.in_flight)} batches in flight")
        for stage, factor in factors.items():
            self.cost.scale(f"stage.{stage}", factor)
        self.generation += 1
        self.next_seq = 0
        self._stage0_free_ns = 0

    def overdue(self, now_ns: int, live_timeout_ns: int, lossless_timeout_ns: int) -> int | None:
        """The oldest batch in flight that should have been reported by now, or None."""
        for seq, flight in self.in_flight.items():
            if now_ns - flight.sent_ns > (live_timeout_ns if flight.live else lossless_timeout_ns):
                return seq
        return None

    def fault(self, reason: str) -> Decisions:
        """Rebuild: a new generation, every slot empty. Live streams lose the blocks under way, lossless ones fail."""
        decisions = Decisions()
        under_way = [work for flight in self.in_flight.values() for work in flight.works]
        self.in_flight.clear()
        self.generation += 1
        self.next_seq = 0
        self._stage0_free_ns = 0
        lost: dict[str, list[ChunkStamp]] = {}
        for work in under_way:
            lost.setdefault(work.stream, []).extend(work.stamps)
        for stream, queue in self.streams.items():
            for work in queue.lose_slots():
                lost.setdefault(stream, []).extend(work.stamps)
                decisions.released.extend(work.inputs)
        for stream, stamps in lost.items():
            queue = self.streams.get(stream)
            if queue is None:
                continue
            if queue.live:
                self._drop(decisions, sorted(stamps, key=lambda stamp: stamp.chunk), "pipeline_fault")
            else:
                decisions.failed[stream] = (
                    f"pipeline {self.pipeline} lost a batch ({reason}): a lossless run cannot go on"
                )
        return decisions

    # --- inside ------------------------------------------------------------------------------------------------------

    def _candidates(self) -> list[Work]:
        found: list[Work] = []
        for queue in self.streams.values():
            found.extend(queue.next_steps())
            entering = queue.candidate()
            if entering is not None:
                found.append(entering)
        return found

    def _bucket(self, work: Work) -> tuple[int, ...]:
        queue = self.streams[work.stream]
        return (work.frames, work.context, queue.height, queue.width)

    def _units(self, work: Work) -> int:
        queue = self.streams[work.stream]
        return work.forward_frames * queue.model.tokens(queue.width, queue.height)

    def _forward_ms(self, units: int) -> float:
        return sum(self.cost.predict(f"stage.{stage}", units) for stage in range(self.stages))

    def _remaining_ns(self, work: Work, items: int) -> int:
        """Predicted nanoseconds from now until the work's pixels are decoded, in batches of ``items``."""
        queue = self.streams[work.stream]
        left = queue.settings.steps if work.item is None else work.item.steps - work.item.step
        units = self._units(work)
        forward = self._forward_ms(units * items)
        decode = self.cost.predict("decode", len(work.stamps))
        return int((forward * left + decode) * NS_PER_MS)

    def _drop_stale(self, queue: StreamQueue, now_ns: int, decisions: Decisions) -> None:
        """Freshness: before step 0, what cannot show even its last frame in time is dropped, never queued."""
        while queue.live and (work := queue.candidate()) is not None:
            # A window that runs along once may make its block late; it must not have every block dropped instead.
            if now_ns + self._remaining_ns(replace(work, context=0), 1) <= work.last_deadline_ns:
                return
            queue.forget(work)
            self._drop(decisions, work.stamps, "stale")
            decisions.released.extend(work.inputs)

    def _send(self, members: list[Work], now_ns: int, decisions: Decisions) -> StageBatch:
        works: list[Work] = []
        for member in members:
            queue = self.streams[member.stream]
            if member.item is None:
                work, applied = queue.enter(member)
                decisions.applied.extend(applied)
            else:
                work = replace(member, item=queue.plan.next(member.item))
                del queue.later[member.item.block]
            waited = StageTiming(hop="scheduler", queue_ms=(now_ns - work.ready_ns) / NS_PER_MS, compute_ms=0.0)
            works.append(replace(work, timings=(*work.timings, waited)))
        first = self.streams[works[0].stream]
        batch = StageBatch(
            pipeline=self.pipeline,
            term=self.term,
            generation=self.generation,
            seq=self.next_seq,
            entries=tuple(_entry(work) for work in works),
            height=first.height,
            width=first.width,
            scheduled_ns=now_ns,
        )
        units = sum(self._units(work) for work in works)
        self.in_flight[self.next_seq] = Flight(tuple(works), now_ns, units, any(work.live for work in works))
        takes_ns = int(self.cost.predict("stage.0", units) * NS_PER_MS)
        self._stage0_free_ns = max(self._stage0_free_ns, now_ns) + takes_ns
        self.next_seq += 1
        return batch

    def _drop(self, decisions: Decisions, stamps: Iterable[ChunkStamp], reason: str) -> None:
        decisions.drops.extend(ChunkDropped(stamp=stamp, service="scheduler", reason=reason) for stamp in stamps)


def _entry(work: Work) -> BatchEntry:
    if work.item is None:
        raise ValueError("a work without an item cannot be sent")
    # Without a source there are no latents: what a chunk carries is an empty tensor.
    inputs = tuple(ref for ref in work.inputs if 0 not in ref.shape)
    return BatchEntry(item=work.item, stamps=work.stamps, inputs=inputs, timings=work.timings)
