"""The scheduler's decisions for one pipeline: what runs next, what can no longer make it, what a fault costs.

Pure and synchronous: ``schedule`` returns a plan, ``done`` and ``fault`` are told what happened; time is passed in. The
service and the simulator run the same code.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain, repeat
from operator import attrgetter

from services.scheduler.batch_messages import stage_batch
from services.scheduler.batching import NEVER_NS, LosslessShare, Ready, choose
from services.scheduler.cost_model import CostModel
from services.scheduler.flights import Flight, Shape, overdue
from services.scheduler.forecast import NS_PER_MS, Forecast
from services.scheduler.policies import SLACK, Growth, Policy
from services.scheduler.stream_queue import Applied, Offer, StreamQueue, Work
from services.scheduler.waits import passed, waited
from services.scheduler.works import Timings
from shared.contracts.events import (
    BatchDone,
    ChunkDropped,
    ChunkStamp,
    MotionEstimated,
    StageBatch,
)
from shared.contracts.refs import TensorRef

DISPATCH_LEAD_NS = 6 * NS_PER_MS  # how long before stage 0 is free the next batch leaves: more than the bus takes
MIN_LONGER_GAIN = 0.1  # of the time per frame: what a longer frame block must save
PROBE_AFTER = 4  # chunks that are dropped as stale in a row; the next is measured: no wrong prediction lasts
AGEING_NS = 50 * NS_PER_MS  # a stream goes first by so much for each chunk in a row that it lost
MAX_AGED = 40
_key_of = attrgetter("key")


@dataclass(slots=True, init=False)
class Decisions:
    """What the service must do now."""

    batches: list[StageBatch]
    drops: list[ChunkDropped]
    applied: list[Applied]
    failed: dict[str, str]  # stream → one line
    released: list[TensorRef]  # inputs nobody will read

    def __init__(self) -> None:  # by hand: three are made for every chunk, and most stay empty
        self.batches, self.drops, self.applied, self.failed, self.released = [], [], [], {}, []


class PipelineCore:
    """Queues, batches in flight and the pipeline's generation.

    ``stages`` is S; up to S+1 batches are in flight. ``latent_tokens(height, width)`` tokens make one latent frame.
    """

    def __init__(
        self,
        pipeline: str,
        stages: int,
        term: int,
        cost: CostModel,
        max_batch: int = 8,
        generation: int = 1,
        policy: Policy = SLACK,
    ) -> None:
        self.pipeline = pipeline
        self.stages = stages
        self.term = term
        self.cost = cost
        self.max_batch = max_batch
        self.generation = generation
        self.policy = policy
        self.forecast = Forecast(cost, stages)
        self.next_seq = 0
        self.streams: dict[str, StreamQueue] = {}
        self.in_flight: dict[int, Flight] = {}
        self._met: set[Shape] = set()  # shapes of forwards that were done
        self.holding = False  # nothing is dispatched: blocks are about to change hands
        self._stage0_free_ns = 0
        self._share = LosslessShare()
        self._ready: dict[str, list[Ready]] = {}  # by stream: what could run now
        self._ordered: list[Ready] = []  # the same, the most urgent first
        self._heard: set[str] = set()  # streams to ask again
        self._skippers: dict[str, StreamQueue] = {}
        self._stale_ns = NEVER_NS  # nothing is stale that stage 0 can begin with before
        self._live = 0
        self._stage_keys = tuple(f"stage.{stage}" for stage in range(stages))

    @property
    def queued(self) -> int:
        """Items that could run now."""
        return len(self._ordered)

    # --- streams -----------------------------------------------------------------------------------------------------

    def add(self, queue: StreamQueue) -> None:
        """A stream joins. Raises ValueError when it is here already."""
        if queue.stream in self.streams:
            raise ValueError(f"stream {queue.stream} is already on pipeline {self.pipeline}")
        self.streams[queue.stream] = queue
        self._live += queue.live
        queue.heard = self._heard  # and it says so

    def remove(self, stream: str) -> list[TensorRef]:
        """A stream leaves; batches that stage 0 admitted run whole (rule 6). Returns the inputs nobody will read."""
        queue = self.streams.pop(stream, None)
        if queue is None:
            return []
        self._live -= queue.live
        queue.heard = set()
        self._heard.discard(stream)
        self._skippers.pop(stream, None)
        self._withdraw(stream)
        return queue.inputs()

    def offer(self, chunk: MotionEstimated, now_ns: int) -> tuple[Offer | None, Decisions]:
        """A chunk is ready. The offer is None when its stream is not here."""
        decisions = Decisions()
        queue = self.streams.get(chunk.stamp.stream)
        if queue is None:
            return None, decisions
        offer = queue.offer(chunk, now_ns)
        for told in chunk.timings:
            if told.hop == "encode":
                units = chunk.latent_frames * queue.tokens
                self._learn("encode", units, told.compute_ms, 1, chunk.latent_frames > 1)
        if offer in (Offer.OVERTAKEN, Offer.FULL):
            self._drop(decisions, (chunk.stamp,), offer.value, (chunk.timings,))
            decisions.released.append(chunk.latents)
        return offer, decisions

    # --- the plan ----------------------------------------------------------------------------------------------------

    def schedule(self, now_ns: int) -> Decisions:
        """Fill the pipeline: drop what can no longer make its deadline, then batch by slack up to S+1 in flight.

        A batch leaves just before stage 0 is predicted to be free, not earlier: what becomes ready meanwhile joins it.
        """
        decisions = Decisions()
        self._renew(now_ns, decisions)
        most = 0 if self.holding else self.stages + 1
        while len(self.in_flight) < most and self._ordered and now_ns >= self.dispatch_at_ns():
            slack = self.policy.growth is Growth.DEADLINES
            ordered = self._share.first(self._ordered, self.forecast) if slack else self._ordered
            begin_ns = self._begin_ns(now_ns)
            members = choose(ordered, begin_ns, self.forecast, self.policy, self.max_batch, self._live > 0)
            if slack:
                newest = self._ordered[-1]  # lossless work comes last
                self._share.sent(members, not newest.work.deadline_ns and newest not in members, self.forecast)
            decisions.batches.append(self._send(members, now_ns, decisions))
            self._renew(now_ns, decisions)
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
        self._met.add(flight.shape)
        if self.stages == 1:  # the one stage is free now, but for what is in flight behind
            behind = sum([self.forecast.stage0_ms(other.units, len(other.works)) for other in self.in_flight.values()])
            self._stage0_free_ns = now_ns + int(behind * NS_PER_MS)
        items = len(flight.works)
        begins = any(work.item is not None and work.item.begins for work in flight.works)
        for key, ms in zip(self._stage_keys, done.stage_ms, strict=False):
            self._learn(key, flight.units * items, ms, items, begins)
        outputs = {
            (result.stream, result.block, result.step): result.output
            for result in done.results
            if result.output is not None
        }
        took: Timings | None = None
        for work in flight.works:
            item = work.item
            if item is None:
                continue
            queue = self.streams.get(work.stream)
            output = outputs.get((item.stream, item.block, item.step)) if outputs else None
            if queue is None or not queue.takes(item.epoch):
                if output is not None:
                    decisions.released.append(output)
                continue
            queue.plan.done(item)
            queue.touch()
            if output is not None:
                took = took or passed(done)
                queue.later[item.block] = work.at(item, (*work.timings, *took), (output,), now_ns)
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
        return overdue(self.in_flight, now_ns, live_timeout_ns, lossless_timeout_ns)

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
            if not queue.live and queue.holds_slots:
                lost.setdefault(stream, [])  # even with nothing under way: what it would go on from is gone
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

    def _learn(self, key: str, units: int, ms: float, items: int, begins: bool) -> None:
        """A measurement. Where a stream ``begins``, memory is touched first: that is believed while nothing else is known."""
        if not begins or not self.cost.known(key):
            self.cost.observe(key, units, ms, items)

    def _begin_ns(self, now_ns: int) -> int:
        """When stage 0 can begin with what is sent now."""
        return max(now_ns, self._stage0_free_ns) if self.in_flight else now_ns

    def _renew(self, now_ns: int, decisions: Decisions) -> None:
        """What could run now, the most urgent first; on the way what can no longer make its deadline is dropped.

        Only streams in which something happened are asked again, and only changed predictions are worked out again.
        """
        begin_ns = self._begin_ns(now_ns)
        if self.forecast.version != self.cost.order_version:
            self.forecast.renew()
            for ready in self._ordered:
                ready.plan(self.forecast, self.policy)
            self._ordered.sort(key=_key_of)
            self._stale_ns = 0
        heard = self._heard
        while heard:
            self._ask(heard.pop(), begin_ns)
        if self._skippers:
            for queue in self._skippers.values():
                queue.hurry(now_ns)
            while heard:
                self._ask(heard.pop(), begin_ns)
        if begin_ns > self._stale_ns:
            for stream, queue in self.streams.items():
                while self._is_stale(stream, begin_ns):
                    self._forget(queue, decisions)
                    self._ask(stream, begin_ns)
            self._heard.clear()
            self._stale_ns = min((found[-1].stale_ns for found in self._ready.values() if found), default=NEVER_NS)

    def _withdraw(self, stream: str) -> None:
        """What it had ready is out of the order."""
        for ready in self._ready.pop(stream, ()):
            at = bisect_left(self._ordered, ready.key, key=_key_of)
            while self._ordered[at] is not ready:
                at += 1
            del self._ordered[at]

    def _ask(self, stream: str, begin_ns: int) -> None:
        """What of one stream could run now: steps of blocks under way, and last the block that could enter."""
        if stream in self._ready:
            self._withdraw(stream)
        queue = self.streams.get(stream)
        if queue is None:
            return
        if queue.hurries:
            self._skippers[stream] = queue
        if not queue.waiting and not queue.later:
            return
        tokens = queue.tokens
        found = [self._as_ready(work, queue, tokens) for work in queue.next_steps()] if queue.later else []
        entering = queue.candidate()
        if entering is not None:
            ready = self._as_ready(entering, queue, tokens)
            if (longest := queue.longest()) > queue.settings.frames_per_block:
                ready = self._longer(queue, ready, longest, tokens, begin_ns)
            found.append(ready)
            self._stale_ns = min(self._stale_ns, ready.stale_ns)
        self._ready[stream] = found
        for ready in found:
            insort(self._ordered, ready, key=_key_of)

    def _as_ready(self, work: Work, queue: StreamQueue, tokens: int) -> Ready:
        item = work.item
        left = queue.settings.steps if item is None else item.steps - item.step - 1
        bucket = (work.frames, work.context, queue.height, queue.width)
        ready = Ready(work, bucket, work.forward_frames * tokens, work.frames * tokens, left)
        if queue.live:
            ready.aged_ns = min(queue.dropped_in_row, MAX_AGED) * AGEING_NS
            if item is None and self.policy.drops_stale:
                ready.expires_ns, ready.probes = work.last_deadline_ns, queue.dropped_in_row >= PROBE_AFTER
        ready.plan(self.forecast, self.policy)
        return ready

    def _longer(self, queue: StreamQueue, own: Ready, longest: int, tokens: int, begin_ns: int) -> Ready:
        """The longest block that saves time per frame and whose first frame is still in time, else the stream's own."""
        per_frame = own.remaining_ns / own.work.frames
        for length in range(longest, queue.settings.frames_per_block, -1):
            work = queue.candidate(length)
            if work is None or not own.remaining_ns:
                break
            ready = self._as_ready(work, queue, tokens)
            in_time = not work.deadline_ns or begin_ns + ready.remaining_ns * self.forecast.margin <= work.deadline_ns
            if in_time and ready.remaining_ns / work.frames <= (1.0 - MIN_LONGER_GAIN) * per_frame:
                return ready
        return own

    def _is_stale(self, stream: str, begin_ns: int) -> bool:
        """Freshness: before step 0, what cannot show even its last frame in time is dropped, never queued.

        After a few in a row one that is not late yet runs all the same: a prediction that is wrong (the device was busy with
        something else for a moment) could never be corrected, if everything was dropped because of it.
        """
        found = self._ready.get(stream)
        return bool(found) and begin_ns > found[-1].stale_ns

    def _forget(self, queue: StreamQueue, decisions: Decisions) -> None:
        work = self._ready[queue.stream][-1].work
        queue.forget(work)
        self._drop(decisions, work.stamps, "stale", work.arrived or (work.timings,))
        decisions.released.extend(work.inputs)

    def _send(self, members: list[Ready], now_ns: int, decisions: Decisions) -> StageBatch:
        works: list[Work] = []
        for member in members:
            work, queue = member.work, self.streams[member.work.stream]
            timings, arrived = waited(work, queue.arrived_ns, now_ns, self.pipeline)
            if work.item is None:
                bound, applied = queue.enter(work, timings, arrived)
                decisions.applied.extend(applied)
                works.append(bound)
            else:
                item = queue.plan.next(work.item)
                del queue.later[item.block]
                works.append(work.at(item, timings, work.inputs, work.ready_ns, arrived))
            queue.touch()
        first, units = self.streams[works[0].stream], members[0].units
        batch = stage_batch(
            self.pipeline, self.term, self.generation, self.next_seq, works, first.height, first.width, now_ns
        )
        shape = (*members[0].bucket, len(works))
        live, met = any(work.live for work in works), shape in self._met
        self.in_flight[self.next_seq] = Flight(tuple(works), now_ns, units, live, shape, met)
        takes_ns = int(self.forecast.stage0_ms(units, len(works)) * NS_PER_MS)
        self._stage0_free_ns = max(self._stage0_free_ns, now_ns) + takes_ns
        self.next_seq += 1
        return batch

    def _drop(
        self, decisions: Decisions, stamps: Iterable[ChunkStamp], reason: str, ways: Iterable[Timings] = ()
    ) -> None:
        decisions.drops.extend(
            ChunkDropped(stamp=stamp, service="scheduler", reason=reason, timings=way)
            for stamp, way in zip(stamps, chain(ways, repeat(())), strict=False)
        )
