"""When cuts move, in virtual time: for a lasting gain that pays, and for nothing else."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.scheduler.balancing import Balancer, Proposal, StageMeter
from services.scheduler.placement import WorkerCost, ranges_of

LAYERS = 30
EVERY_S = 0.25
Speed = Callable[[int, float], float]


class Virtual:
    """A pipeline whose stages take what ``speed`` (stage, now) says for each block; batches pass at a steady rate."""

    def __init__(self, speed: Speed, cuts: tuple[int, ...] = (15,), rate: float = 25.0, noise: float = 0.0) -> None:
        self.speed, self.cuts, self.rate, self.noise = speed, cuts, rate, noise
        self.meter, self.balancer, self.now = StageMeter(), Balancer(), 0.0
        self.random = random.Random(1)
        self.proposals: list[tuple[float, Proposal]] = []
        self.block_pause_s = 0.01
        self.stall_at = -1.0
        self.degraded = False
        self.roles: dict[str, float] = {}

    def run(self, seconds: float, carry_out: bool = True) -> None:
        due, until, asked = self.now, self.now + seconds, self.now
        while self.now < until:
            self.now = round(self.now + 0.01, 6)
            if self.now >= due:
                due += 1 / self.rate
                stalls = 40.0 if 0 <= self.now - self.stall_at < 1 / self.rate else 1.0
                stage_ms = [
                    len(blocks) * self.speed(stage, self.now) * (1 + self.noise * self.random.uniform(-1, 1)) * stalls
                    for stage, blocks in enumerate(ranges_of(self.cuts, LAYERS))
                ]
                self.meter.encoded += 1
                self.meter.batch(self.now, 100, stage_ms, 1)
                for role, ms in self.roles.items():
                    self.meter.role(role, ms, self.now)
            if self.now >= asked:
                asked += EVERY_S
                workers = self.meter.workers(self.cuts, LAYERS, len(self.cuts), self.now)
                proposal = self.balancer.observe(
                    self.now, workers, self.cuts, LAYERS, self.block_pause_s, self.degraded
                )
                if proposal is not None:
                    self.proposals.append((self.now, proposal))
                    if carry_out:
                        self.cuts = proposal.cuts
                        self.balancer.moved(self.now)
                        self.meter.cleared(self.now)


def test_a_straggler_is_seen_and_relieved_within_four_seconds() -> None:
    pipeline = Virtual(lambda stage, now: 2.0 if stage == 1 and now >= 30 else 1.0, noise=0.05)
    pipeline.run(30)
    assert pipeline.proposals == [], "even stages stay as they are"
    pipeline.run(5)
    at, proposal = pipeline.proposals[0]
    assert at - 30 <= 4.0, "one second of the five is left for the move itself"
    assert proposal.cuts[0] >= 19
    assert proposal.gain > 0.2
    pipeline.run(60)
    assert pipeline.cuts in {(19,), (20,), (21,)}
    assert len(pipeline.proposals) <= 2, "what is balanced stays"


def test_one_stall_and_noise_move_nothing() -> None:
    pipeline = Virtual(lambda stage, now: 1.0, noise=0.3)
    pipeline.stall_at = 12.0
    pipeline.run(60)
    assert pipeline.proposals == []


def test_a_gain_that_does_not_last_moves_nothing() -> None:
    pipeline = Virtual(lambda stage, now: 2.0 if stage == 1 and now % 10 > 9.2 else 1.0)
    pipeline.run(60)
    assert pipeline.proposals == []


def test_a_move_must_pay_for_its_pause() -> None:
    pipeline = Virtual(lambda stage, now: 2.0 if stage else 1.0)
    pipeline.block_pause_s = 10.0
    pipeline.run(20)
    assert pipeline.proposals == []
    pipeline.block_pause_s = 0.1
    pipeline.run(20)
    assert pipeline.cuts == (20,)


def test_encode_and_decode_count_where_they_are() -> None:
    pipeline = Virtual(lambda stage, now: 1.0)
    pipeline.roles = {"decode": 10.0, "text": 999.0}
    pipeline.run(10)
    assert pipeline.cuts == (20,), "decode's worker holds ten blocks less, in milliseconds"


def in_bursts(now: float) -> float:
    """Three times a second something else has the worker for a while: it is 2.2 times as slow on the whole."""
    return 5.0 if now % 0.333 < 0.1 else 1.0


def test_a_worker_that_is_slow_in_bursts_is_relieved_within_four_seconds_too() -> None:
    for seed in range(5):
        pipeline = Virtual(lambda stage, now: in_bursts(now) if stage and now >= 30 else 1.0, noise=0.05)
        pipeline.random.seed(seed)
        pipeline.run(30)
        assert pipeline.proposals == []
        pipeline.run(5)
        at, proposal = pipeline.proposals[0]
        assert at - 30 <= 4.0
        assert proposal.cuts[0] > 17


def test_stages_that_are_hardly_busy_stay_as_they_are_until_a_stream_had_to_give_something_up() -> None:
    pipeline = Virtual(lambda stage, now: 2.0 if stage else 1.0, rate=8.0, noise=0.05)
    pipeline.run(60)
    assert pipeline.proposals == [], "the slow one has 24 % to do"
    pipeline.degraded = True
    pipeline.run(5)
    assert pipeline.cuts in {(19,), (20,), (21,)}, "so little is to do because the ladder left it no more"


def test_a_straggler_is_seen_where_batches_are_rare_as_well() -> None:
    pipeline = Virtual(lambda stage, now: 40.0 if stage and now >= 30 else 20.0, rate=1.5)
    pipeline.run(30)
    assert pipeline.proposals == []
    pipeline.run(6)
    assert len(pipeline.proposals) == 1


@pytest.mark.parametrize("together", [True, False])
def test_cores_that_are_shared_with_others_do_not_make_it_swing(together: bool) -> None:
    """Others take the cores for seconds and for moments, from both stages alike or now from one and now from the other."""
    chance = random.Random(7)
    slow: dict[tuple[int, int], float] = {}

    def speed(stage: int, now: float) -> float:
        moment = slow.setdefault((0 if together else stage, int(now * 8)), chance.choice([1.0, 1.0, 1.0, 1.5, 3.0]))
        return moment * (1.8 if now % 20 > 12 else 1.0)

    pipeline = Virtual(speed, noise=0.3)
    pipeline.run(300)
    assert len(pipeline.proposals) <= (0 if together else 1), pipeline.proposals


def test_failures_wait_longer_each_time() -> None:
    pipeline = Virtual(lambda stage, now: 2.0 if stage else 1.0)
    tried: list[float] = []
    while pipeline.now < 100:
        pipeline.run(0.25, carry_out=False)
        if pipeline.proposals:
            tried.append(pipeline.now)
            pipeline.proposals.clear()
            pipeline.balancer.failed(pipeline.now)
    gaps = [b - a for a, b in zip(tried, tried[1:], strict=False)]
    assert len(gaps) >= 3
    assert all(later > earlier * 1.5 for earlier, later in zip(gaps, gaps[1:], strict=False))


@settings(max_examples=15, deadline=None)
@given(st.lists(st.sampled_from([0.5, 1.0, 2.0, 4.0]), min_size=2, max_size=4), st.integers(0, 10))
def test_whatever_the_speeds_it_settles(speeds: list[float], seed: int) -> None:
    stages = len(speeds)
    pipeline = Virtual(lambda stage, now: speeds[stage], tuple(range(1, stages)), noise=0.05)
    pipeline.random.seed(seed)
    pipeline.run(25)
    settled = pipeline.cuts
    slowest = max(len(r) * speeds[k] for k, r in enumerate(ranges_of(settled, LAYERS)))
    ideal = LAYERS / sum(1 / s for s in speeds)
    assert slowest <= ideal * 1.4 + max(speeds), "within the threshold of a second move, and a block"
    moves = len(pipeline.proposals)
    pipeline.run(20)
    assert len(pipeline.proposals) <= moves + 1


def test_too_few_batches_say_nothing() -> None:
    meter = StageMeter()
    for at in range(5):
        meter.batch(at * 0.1, 10, (1.0, 9.0), 1)
    assert meter.workers((15,), LAYERS, 1, 0.5) is None
    meter.batch(0.5, 10, (1.0, 9.0), 1)
    workers = meter.workers((15,), LAYERS, 1, 0.5)
    assert workers is not None
    assert workers[1].per_block > workers[0].per_block * 5
    assert meter.workers((10, 20), LAYERS, 2, 0.5) is None, "batches of other stages do not count"
    assert Balancer().observe(1.0, [WorkerCost(1.0)], (), LAYERS, 0.0) is None, "one stage has nothing to move"


def test_what_was_encoded_before_the_cuts_moved_weighs_nothing_after() -> None:
    meter = StageMeter()
    meter.role("encode", 5.0, 0.0)
    meter.encoded += 40  # while the pipeline stood still for the move
    meter.cleared(1.0)
    for at in range(10):
        meter.encoded += 1
        meter.batch(1.0 + at * 0.2, 10, (1.0, 1.0), 1)
    workers = meter.workers((15,), LAYERS, 1, 3.0)
    assert workers is not None
    assert workers[0].fixed == 10 * 5.0 / 2.0
