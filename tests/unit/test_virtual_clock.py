"""The simulator's clock: events happen in the order of their times, at the same time in the order they were asked for."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from services.scheduler.simulator.clock import VirtualClock

times = st.integers(0, 6_000_000)


@given(st.lists(st.tuples(times, times), max_size=40), st.lists(times, max_size=6))
def test_whatever_is_asked_for_happens_in_order_and_once(asked: list[tuple[int, int]], stops: list[int]) -> None:
    clock = VirtualClock()
    happened: list[tuple[int, int]] = []
    due: list[tuple[int, int]] = []

    def ask(when: int, follows: int) -> None:
        due.append((max(when, clock.now), len(due)))
        clock.at(when, happen, (len(due) - 1, follows))

    def happen(what: tuple[int, int]) -> None:
        number, follows = what
        assert clock.now == due[number][0]
        happened.append(due[number])
        if follows:
            ask(clock.now + follows, 0)

    for when, follows in asked:
        ask(when, follows)
    for stop in sorted(stops):
        clock.run(stop)
        assert clock.now == stop
        assert all(when <= stop for when, _ in happened)
        ask(stop - 1_000_000, 0)  # past: at once
    clock.run(20_000_000)
    assert happened == sorted(due)
    assert clock.events == len(due)
