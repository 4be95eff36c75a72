"""What the scheduler promises, against brute force and over long runs, in virtual time on one stage.

The costs are known exactly: ``fixed + per_token · tokens`` for a forward, measured often enough that the model's error is 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from services.scheduler.batching import LOSSLESS_SHARE
from services.scheduler.core import Decisions, PipelineCore
from services.scheduler.cost_model import CostModel
from services.scheduler.policies import POLICIES
from services.scheduler.stream_queue import Offer, StreamQueue, StreamSettings
from shared.contracts.events import BatchDone, ChunkStamp, FrameStamp, ItemResult, MotionEstimated, StageBatch
from shared.engine.plan.spec import PRESETS
from shared.engine.plan.stream_plan import StreamPlan
from tests.unit.test_scheduler_core import MS, REF

MODEL = PRESETS["nano"]
SIZES = ((64, 96), (64, 128), (96, 128))  # height, width: 24, 32 and 48 tokens of a latent frame
SURE = 12  # measurements as predicted: nothing of the assumed error is left
EXACT = settings(derandomize=True, max_examples=40, deadline=None, phases=(Phase.generate,))  # shrinking takes minutes
EPSILON_NS = 1_000  # predictions are rounded


@dataclass(frozen=True)
class Cost:
    """Milliseconds of a forward with so many latent tokens."""

    fixed: float
    per_token: float

    def ms(self, tokens: int) -> float:
        return self.fixed + self.per_token * tokens

    def model(self, max_batch: int, frames: Sequence[int] = (1, 2)) -> CostModel:
        known = CostModel()
        sizes = {MODEL.tokens(width, height) * count for height, width in SIZES for count in frames}
        shapes = [(items, units * items) for units in sizes for items in range(1, max_batch + 1)]
        known.seed("stage.0", [(items, tokens, self.ms(tokens)) for items, tokens in shapes])
        items, tokens = shapes[0]
        for _ in range(SURE):
            known.observe("stage.0", tokens, self.ms(tokens), items)
        assert known.error("stage.0") < 1e-9
        return known


@dataclass
class Line:
    """A core and its one worker, which takes exactly what the cost says, one batch after the other."""

    cost: Cost
    max_batch: int
    policy: str = "slack"
    now: int = 0
    core: PipelineCore = field(init=False)
    flying: list[StageBatch] = field(default_factory=list)
    ends_ns: int = 0  # of the batch that runs now
    ran: list[tuple[int, int, StageBatch]] = field(default_factory=list)  # begin, end
    entered: dict[str, int] = field(default_factory=dict)  # chunks, by stream
    dropped: dict[str, int] = field(default_factory=dict)
    dropped_at: list[tuple[ChunkStamp, int]] = field(default_factory=list)  # when stage 0 could have begun with it

    def __post_init__(self) -> None:
        model = self.cost.model(self.max_batch)
        self.core = PipelineCore("p0", 1, 1, model, self.max_batch, policy=POLICIES[self.policy])

    def stream(self, name: str, size: tuple[int, int] = SIZES[0], live: bool = True, **bound: int) -> StreamQueue:
        asked = StreamSettings(**{"steps": 1, "seed": 1, "prompt_version": 1, **bound})
        plan = StreamPlan.for_model(name, 1, MODEL)
        queue = StreamQueue(name, 1, live, size[0], size[1], MODEL, plan, asked)
        self.core.add(queue)
        self.entered[name] = self.dropped[name] = 0
        return queue

    def offer(self, name: str, number: int, deadline_ns: int) -> Offer | None:
        """A chunk is ready; deadline 0: lossless."""
        count, first = (5, 0) if number == 0 else (4, 4 * number + 1)
        frames = tuple(
            FrameStamp(index=first + i, pts=first + i, captured_ns=self.now, deadline_ns=deadline_ns)
            for i in range(count)
        )
        stamp = ChunkStamp(stream=name, epoch=1, chunk=number, frames=frames, live=deadline_ns > 0)
        offer, decisions = self.core.offer(
            MotionEstimated(
                stamp=stamp,
                latents=REF,
                latent_frames=2 if number == 0 else 1,
                motion=0.0,
                noise_scale=0.7,
                first_timestep=600,
            ),
            self.now,
        )
        self.count(decisions)
        return offer

    def schedule(self) -> None:
        decisions = self.core.schedule(self.now)
        for batch in decisions.batches:
            if not self.flying:
                self.ends_ns = self.now + self.takes_ns(batch)
            self.flying.append(batch)
            for entry in batch.entries:
                if entry.item.step == 0:
                    self.entered[entry.item.stream] += len(entry.stamps)
        self.count(decisions)

    def count(self, decisions: Decisions) -> None:
        for drop in decisions.drops:
            if drop.reason != "pipeline_fault":  # those had entered
                self.dropped[drop.stamp.stream] += 1
                self.dropped_at.append((drop.stamp, max(self.now, self.ends_ns if self.flying else 0)))

    def takes_ns(self, batch: StageBatch) -> int:
        tokens = MODEL.tokens(batch.width, batch.height)
        return int(self.cost.ms(sum(entry.item.frames for entry in batch.entries) * tokens) * MS)

    def finish(self) -> None:
        """The oldest batch comes back, when it does; the one behind it begins."""
        batch = self.flying.pop(0)
        self.now = max(self.now, self.ends_ns)
        takes = self.takes_ns(batch)
        self.ran.append((self.ends_ns - takes, self.ends_ns, batch))
        results = tuple(
            ItemResult(
                stream=entry.item.stream,
                epoch=entry.item.epoch,
                block=entry.item.block,
                step=entry.item.step,
                output=None if entry.item.is_last_step else REF,
            )
            for entry in batch.entries
        )
        done = BatchDone(
            pipeline="p0", generation=batch.generation, seq=batch.seq, results=results, stage_ms=(takes / MS,)
        )
        if self.flying:
            self.ends_ns += self.takes_ns(self.flying[0])
        self.count(self.core.done(done, self.now))

    def run(self, until_ns: int | None = None, tick: Callable[[], int | None] = lambda: None) -> None:
        """Until then, or nothing is left to do. ``tick`` is asked at every event, and says when it wants the next."""
        while until_ns is None or self.now < until_ns:
            wanted = tick()
            self.schedule()
            times = [wanted] if wanted is not None else []
            if self.flying:
                times += [self.ends_ns]
                if self.core.queued and self.core.dispatch_at_ns() > self.now and len(self.flying) < 2:
                    times += [self.core.dispatch_at_ns()]
            if not times:
                return
            if self.flying and min(times) >= self.ends_ns:
                self.finish()
            else:
                self.now = max(self.now, min(times))


@dataclass(frozen=True)
class Job:
    """One chunk of one stream, there from the beginning."""

    name: str
    size: tuple[int, int]
    deadline_ms: float

    @property
    def tokens(self) -> int:
        return 2 * MODEL.tokens(self.size[1], self.size[0])  # a first chunk has two latent frames


def can_all_be_met(jobs: tuple[Job, ...], cost: Cost, max_batch: int, now_ms: float = 0.0) -> bool:
    """Brute force over every order and every grouping of equals into forwards."""
    if not jobs:
        return True
    for count in range(1, min(max_batch, len(jobs)) + 1):
        for group in combinations(jobs, count):
            end_ms = now_ms + cost.ms(sum(job.tokens for job in group))
            alike = len({job.size for job in group}) == 1
            if alike and all(end_ms <= job.deadline_ms - 0.01 for job in group):
                left = tuple(job for job in jobs if job not in group)
                if can_all_be_met(left, cost, max_batch, end_ms):
                    return True
    return False


def missed_by_ms(jobs: Sequence[Job], cost: Cost, max_batch: int, policy: str = "slack") -> dict[str, float]:
    """What the policy made late, or dropped because it would have been, and by how much."""
    line = Line(cost, max_batch, policy)
    for job in jobs:
        line.stream(job.name, job.size)
        line.offer(job.name, 0, int(job.deadline_ms * MS))
    line.run()
    deadlines = {job.name: int(job.deadline_ms * MS) for job in jobs}
    tokens = {job.name: job.tokens for job in jobs}
    ends = {entry.item.stream: end for _, end, batch in line.ran for entry in batch.entries}
    for stamp, begin_ns in line.dropped_at:
        ends[stamp.stream] = begin_ns + int(cost.ms(tokens[stamp.stream]) * MS)
    assert ends.keys() == deadlines.keys()
    late = {name: ends[name] - deadline for name, deadline in deadlines.items()}
    return {name: by / MS for name, by in late.items() if by > EPSILON_NS}


@st.composite
def kept(draw: st.DrawFn, sizes: int, max_batch: int) -> tuple[list[Job], Cost]:
    """Jobs and costs whose deadlines some schedule keeps: one is drawn, and each deadline lies a little after its end."""
    cost = Cost(draw(st.floats(2.0, 20.0)), draw(st.floats(0.05, 0.4)))
    now, jobs = 0.0, list[Job]()
    while len(jobs) < 5:
        size = SIZES[draw(st.integers(0, sizes - 1))]
        count = draw(st.integers(1, min(max_batch, 5 - len(jobs))))
        now += cost.ms(2 * MODEL.tokens(size[1], size[0]) * count)
        for _ in range(count):
            jobs.append(Job(f"s{len(jobs)}", size, now + draw(st.sampled_from((0.05, 0.05, 5.0, 20.0, 60.0)))))
    return draw(st.permutations(jobs)), cost


@EXACT
@given(st.integers(1, 4).flatmap(lambda most: st.tuples(st.just(most), kept(1, most))))
def test_of_one_size_every_set_that_can_be_met_is_met_in_batches_too(drawn: tuple[int, tuple[list[Job], Cost]]) -> None:
    max_batch, (jobs, cost) = drawn
    assert can_all_be_met(tuple(jobs), cost, max_batch)
    assert missed_by_ms(jobs, cost, max_batch) == {}


@EXACT
@given(st.lists(st.floats(5.0, 200.0), min_size=2, max_size=5), st.integers(1, 3), st.floats(2.0, 20.0))
def test_and_nothing_is_missed_but_in_a_set_that_cannot_be_met(
    deadlines: list[float], max_batch: int, fixed: float
) -> None:
    cost = Cost(fixed, 0.3)
    jobs = tuple(Job(f"s{number}", SIZES[0], deadline) for number, deadline in enumerate(deadlines))
    if missed_by_ms(jobs, cost, max_batch):
        assert not can_all_be_met(jobs, cost, max_batch)


@EXACT
@given(kept(3, 1))
def test_of_several_sizes_one_by_one_edf_meets_all_and_slack_misses_by_the_difference_at_most(
    drawn: tuple[list[Job], Cost],
) -> None:
    """Whoever goes before j has d − p ≤ d_j − p_j, so d ≤ d_j + p_max − p_j; what is due by then can be done by then."""
    jobs, cost = drawn
    assert can_all_be_met(tuple(jobs), cost, 1)
    assert missed_by_ms(jobs, cost, 1, "edf") == {}
    longest = max(cost.ms(job.tokens) for job in jobs)
    own = {job.name: cost.ms(job.tokens) for job in jobs}
    for name, by in missed_by_ms(jobs, cost, 1).items():
        assert by <= longest - own[name] + EPSILON_NS / MS


def test_least_slack_over_several_sizes_is_a_heuristic() -> None:
    cost = Cost(2.0, 0.5)  # 26 ms and 50 ms
    long, short = Job("long", SIZES[2], 80.0), Job("short", SIZES[0], 60.0)
    assert can_all_be_met((long, short), cost, 1)
    assert missed_by_ms((long, short), cost, 1, "edf") == {}
    assert missed_by_ms((long, short), cost, 1) == pytest.approx({"short": 16.0}, abs=0.01)


@dataclass
class Crowd:
    """Live streams that want more than there is, beside one lossless stream that always has chunks waiting."""

    line: Line
    live: dict[str, int]  # name → the next chunk's number
    every_ns: int
    delay_ns: int
    lossless: int = 0
    next_ns: int = 0

    def tick(self) -> int:
        while self.line.now >= self.next_ns:
            for name in self.live:
                self.line.offer(name, self.live[name], self.next_ns + self.delay_ns)
                self.live[name] += 1
            self.next_ns += self.every_ns
        while len(self.line.core.streams["film"].waiting) < 4:
            self.line.offer("film", self.lossless, 0)
            self.lossless += 1
        return self.next_ns


def lossless_turns(line: Line) -> Iterator[tuple[int, int, int]]:
    """Of each lossless batch: how long live ones ran since the one before, the longest of these, its own time."""
    live_ns = longest_ns = 0
    for begin, end, batch in line.ran:
        if any(entry.item.stream == "film" for entry in batch.entries):
            yield live_ns, longest_ns, end - begin
            live_ns = longest_ns = 0
        else:
            live_ns, longest_ns = live_ns + end - begin, max(longest_ns, end - begin)


@settings(EXACT, max_examples=12)
@given(
    st.integers(2, 6),
    st.integers(1, 3),
    st.floats(2.0, 15.0),
    st.floats(0.1, 0.6),
    st.integers(1, 4),
    st.sampled_from(SIZES[1:]),
    st.floats(1.3, 4.0),
)
def test_a_lossless_stream_beside_too_many_live_ones_keeps_its_share(
    streams: int, steps: int, fixed: float, per_token: float, max_batch: int, size: tuple[int, int], load: float
) -> None:
    """Between two lossless turns: nine times the time of a lossless item, and two live batches more (one each side)."""
    cost = Cost(fixed, per_token)
    line = Line(cost, max_batch)
    line.stream("film", size, live=False, steps=steps)
    names = [f"s{number}" for number in range(streams)]
    for name in names:
        line.stream(name, SIZES[0], steps=2)
    tokens = MODEL.tokens(SIZES[0][1], SIZES[0][0])
    cheapest_ms = cost.ms(tokens * max_batch) / max_batch * 2 * streams
    crowd = Crowd(line, dict.fromkeys(names, 0), int(cheapest_ms / load * MS), int(4 * cheapest_ms * MS))
    line.run(8_000 * MS, crowd.tick)
    assert sum(line.dropped[name] for name in names) > 0, "there was too much to do"
    assert line.dropped["film"] == 0
    item_ns = cost.ms(MODEL.tokens(size[1], size[0])) * MS
    turns = list(lossless_turns(line))
    for live_ns, longest_ns, _ in turns[steps + 1 :]:  # its first block is longer
        assert live_ns <= (1 / LOSSLESS_SHARE - 1) * item_ns + 2 * longest_ns + EPSILON_NS
    assert sum(own_ns for _, _, own_ns in turns) >= 0.9 * LOSSLESS_SHARE * line.now, "all but a tenth of a tenth"


ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(["offer", "offer", "burst", "repeat", "skip", "finish", "wait", "fault"]), st.integers(0, 3)
    ),
    min_size=10,
    max_size=60,
)


@EXACT
@given(ACTIONS, st.lists(st.tuples(st.integers(1, 3), st.booleans(), st.integers(0, 3)), min_size=4, max_size=4))
def test_at_any_moment_what_entered_was_dropped_or_waits_is_what_was_offered(
    actions: list[tuple[str, int]], streams: list[tuple[int, bool, int]]
) -> None:
    line = Line(Cost(30.0, 1.0), 3)
    offered = {f"s{index}": 0 for index in range(len(streams))}
    numbers = dict.fromkeys(offered, 0)
    for index, (steps, live, longest) in enumerate(streams):
        line.stream(f"s{index}", SIZES[index % 2], live, steps=steps, max_frames_per_block=longest)

    def offer(name: str, number: int) -> None:
        queue = line.core.streams[name]
        if line.offer(name, number, line.now + 300 * MS if queue.live else 0) is not Offer.DUPLICATE:
            offered[name] += 1

    for action, index in actions:
        name = f"s{index}"
        there = name in line.core.streams
        if action in ("offer", "burst") and there:
            for _ in range(1 if action == "offer" else 25):
                offer(name, numbers[name])
                numbers[name] += 1
        elif action == "repeat" and there and numbers[name]:
            offer(name, numbers[name] - 1)
        elif action == "skip" and there:  # one is overtaken by the one after it
            offer(name, numbers[name] + 1)
            offer(name, numbers[name])
            numbers[name] += 2
        elif action == "finish" and line.flying:
            line.finish()
        elif action == "wait":
            line.now += 150 * MS * index
        elif action == "fault":
            decisions = line.core.fault("scripted")
            line.flying.clear()
            line.count(decisions)
            for failed in decisions.failed:
                line.core.remove(failed)
        line.schedule()
        for each, queue in line.core.streams.items():
            assert line.entered[each] + line.dropped[each] + len(queue.waiting) == offered[each]
