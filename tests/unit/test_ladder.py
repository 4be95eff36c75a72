"""Under load streams give up what they can spare, in their own order, fast; they get it back slowly, and nothing flaps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest

from services.scheduler.ladder import Ladder, LadderRules, TierChange, Wish, rungs
from services.scheduler.pricing import Demand
from shared.contracts.tiers import Quality
from tests.support.costs import KnownCosts, demand, shape

ASKED = demand(min_steps=1, min_fps=4.0, deadline_ms=3000.0, fps=16.0)
TICK_S = 0.1


@dataclass
class Clocked:
    """A ladder under a virtual clock."""

    ladder: Ladder
    costs: KnownCosts
    now: float = 0.0
    told: list[tuple[float, TierChange]] = field(default_factory=list)

    def run(self, seconds: float, each: Callable[[float], None] = lambda _: None) -> list[tuple[float, TierChange]]:
        """What was decided meanwhile."""
        until, before = self.now + seconds, len(self.told)
        while self.now < until:
            self.now += TICK_S
            each(self.now)
            self.told += [(self.now, change) for change in self.ladder.decide(self.now)]
        return self.told[before:]

    def slow(self, factor: float) -> None:
        """The device takes so many times as long."""
        self.costs.slower = {"stage.0": factor, "encode": factor, "decode": factor}


def clocked(streams: int, load: float, wish: Wish | None = None, **changes: object) -> Clocked:
    """So many equal streams that make this load together."""
    costs = KnownCosts(stage_fixed=0.0)
    ladder = Ladder(shape(max_batch=1), costs, LadderRules(**changes))  # type: ignore[arg-type]
    for number in range(streams):
        ladder.join(f"s{number}", wish or Wish(ASKED))
    made = Clocked(ladder, costs)
    made.slow(load / ladder.book.load())
    return made


def tiers(made: Clocked) -> list[Demand]:
    return [tier for number in range(len(made.ladder)) if (tier := made.ladder.tier(f"s{number}")) is not None]


def test_rungs_lie_between_what_is_asked_and_the_bounds_in_the_streams_own_order() -> None:
    wish = Wish(replace(ASKED, steps=3), max_frames_per_block=2)
    named = {"steps": "S", "frames_per_block": "T", "fps": "F"}

    def order(quality: Quality) -> str:
        return "".join(
            named[name] for rung in rungs(replace(wish, quality=quality)) for name in named if getattr(rung, name)
        )

    assert order(Quality.BALANCED) == "SSTFF"
    assert order(Quality.LOWEST_LATENCY) == "SSFF"
    assert order(Quality.BEST_PICTURE) == "TFFSS"
    bound = Wish(replace(ASKED, min_steps=2, min_fps=16.0))
    assert rungs(bound) == []


def test_at_the_load_that_was_promised_nothing_moves() -> None:
    assert clocked(8, 0.85).run(60.0) == []
    assert clocked(8, 0.94).run(60.0) == []


def test_twice_too_much_is_answered_within_a_second_and_as_far_as_needed() -> None:
    made = clocked(8, 1.7)
    told = made.run(1.0)
    assert told
    assert max(at for at, _ in told) <= 0.7
    assert made.ladder.book.load() <= 0.86
    assert all(change.degraded and "170%" in change.reason for _, change in told)
    assert made.run(3.0) == [], "as many rungs as needed, at once"


def test_all_give_a_little_before_one_gives_a_lot() -> None:
    made = clocked(8, 1.25)
    made.run(1.0)
    assert {tier.steps for tier in tiers(made)} == {1}
    assert {tier.fps for tier in tiers(made)} == {16.0}
    made = clocked(8, 1.05)
    made.run(1.0)
    assert sorted(tier.steps for tier in tiers(made)).count(1) < 8
    assert made.ladder.tier("s7") != ASKED, "who came last gives first"
    assert made.ladder.tier("s0") == ASKED


def test_better_tiers_come_back_slowly_and_one_after_the_other() -> None:
    made = clocked(8, 1.7)
    made.run(2.0)
    assert ASKED not in tiers(made)
    made.slow(made.costs.slower["stage.0"] / 3)
    told = made.run(4.5)
    assert told == []
    told = made.run(30.0)
    assert tiers(made) == [ASKED] * 8
    assert all("room" in change.reason for _, change in told)
    assert not told[-1][1].degraded
    times = [at for at, _ in told]
    assert max(times.count(at) for at in times) <= 2, "a quarter of the streams a second"


def test_nothing_flaps_under_a_load_that_fits_only_when_degraded() -> None:
    made = clocked(8, 1.3)
    told = made.run(120.0)
    assert all(change.degraded for _, change in told), "nothing goes up that would come down again"
    assert max(at for at, _ in told) < 1.0


def test_a_load_that_comes_and_goes_makes_the_ladder_wait_longer_each_time() -> None:
    made = clocked(8, 0.6)
    base = made.costs.slower["stage.0"]

    def wave(now: float) -> None:
        made.slow(base * (2.2 if now % 12 < 3 else 1.0))

    made.run(240.0, wave)
    ups = [at for at, change in made.told if "room" in change.reason]
    early = len([at for at in ups if at < 40])
    assert early > 0
    assert len([at for at in ups if at > 200]) < early


def test_a_pin_decides_who_gives_first_and_what() -> None:
    costs = KnownCosts(stage_fixed=0.0)
    ladder = Ladder(shape(max_batch=1), costs)
    for name, quality in (
        ("latency", Quality.LOWEST_LATENCY),
        ("balanced", Quality.BALANCED),
        ("picture", Quality.BEST_PICTURE),
    ):
        ladder.join(name, Wish(ASKED, quality))
    made = Clocked(ladder, costs)
    made.slow(0.955 / ladder.book.load())
    assert {change.stream for _, change in made.run(1.0)} == {"latency"}
    made.slow(1.5 * made.costs.slower["stage.0"])
    made.run(1.0)
    picture = ladder.tier("picture")
    assert picture is not None
    assert picture.steps == 2, "the picture is kept to the last"
    made.slow(3 * made.costs.slower["stage.0"])
    made.run(2.0)
    picture = ladder.tier("picture")
    assert picture is not None
    assert (picture.steps, picture.fps) == (1, 8.0)


def test_longer_blocks_only_where_they_save_enough() -> None:
    wish = Wish(replace(ASKED, min_steps=2, min_fps=16.0), max_frames_per_block=2)
    dear = clocked(4, 1.3, wish)
    dear.costs.stage_fixed = 8.0  # a forward costs much in any case: half as many forwards
    dear.slow(dear.costs.slower["stage.0"] * 1.3 / dear.ladder.book.load())
    dear.run(1.0)
    assert {tier.frames_per_block for tier in tiers(dear)} == {2}
    bound_by_arithmetic = clocked(4, 1.3, wish)
    assert bound_by_arithmetic.run(5.0) == []


def test_a_rung_that_would_miss_the_deadline_is_left_out() -> None:
    tight = Wish(replace(ASKED, deadline_ms=350.0))  # at 16 fps a chunk takes 188 ms, at 12 fps 250, at 8 fps 438
    made = clocked(40, 3.0, tight)
    made.run(3.0)
    assert {(tier.steps, tier.fps) for tier in tiers(made)} == {(1, 12.0)}


def test_pictures_that_come_late_count_even_if_the_model_says_all_is_well() -> None:
    made = clocked(8, 0.7)

    def late(now: float) -> None:
        for number in range(8):
            made.ladder.closed(f"s{number}", 4, 1, now)

    told = made.run(1.0, late)
    assert told
    assert "late" in told[0][1].reason
    first = made.ladder.book.load()
    made.run(2.0, late)
    assert made.ladder.book.load() < first, "not enough yet: more is taken"


def test_one_stream_with_a_deadline_of_its_own_troubles_itself_only() -> None:
    made = clocked(8, 0.7)
    made.run(5.0, lambda now: made.ladder.closed("s3", 4, 4, now))
    assert {change.stream for _, change in made.told} == {"s3"}


def test_a_users_wish_moves_the_base_and_a_degraded_stream_gets_no_more_than_it_costs_now() -> None:
    made = clocked(4, 0.5)
    wish = Wish(replace(ASKED, steps=1))
    assert made.ladder.ask("s0", wish) == wish.asked
    more = Wish(replace(ASKED, steps=4))
    assert made.ladder.ask("s0", more) == more.asked, "with room, the wish is met at once"
    full = clocked(4, 1.7)
    full.run(1.0)
    before = full.ladder.book.load()
    given = full.ladder.ask("s0", more)
    assert given.steps < 4
    assert full.ladder.book.load() <= before + 1e-9
    with pytest.raises(KeyError):
        full.ladder.ask("gone", more)


def test_a_stream_let_in_with_less_rises_when_there_is_room() -> None:
    made = clocked(2, 0.5)
    low = replace(ASKED, steps=1, fps=12.0)
    made.ladder.join("new", Wish(ASKED), low)
    assert made.ladder.tier("new") == low
    told = made.run(20.0)
    assert [change.tier for _, change in told] == [replace(ASKED, steps=1), ASKED]
    made.ladder.leave("new")
    made.ladder.leave("new")
    assert made.ladder.tier("new") is None
    assert len(made.ladder) == 2
