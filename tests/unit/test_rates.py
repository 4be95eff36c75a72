"""A name may do so much a second, and so much at once; others are not touched by it."""

from __future__ import annotations

import pytest

from shared.rates import Rates


def test_a_burst_then_the_rate_and_nobody_else_pays_for_it() -> None:
    rates = Rates(10.0, 3)
    assert [rates.take("a", 0.0) for _ in range(3)] == [0.0, 0.0, 0.0]
    assert rates.take("a", 0.0) == pytest.approx(0.1)
    assert rates.take("b", 0.0) == 0.0
    assert rates.take("a", 0.11) == 0.0
    assert rates.take("a", 0.11) > 0
    assert rates.refused == 2


def test_time_that_runs_backwards_gives_nothing_away_and_names_are_bounded() -> None:
    rates = Rates(1.0, 1, most=2)
    assert rates.take("a", 10.0) == 0.0
    assert rates.take("a", 5.0) > 0
    for name in "bcd":
        assert rates.take(name, 10.0) == 0.0
    assert len(rates._buckets) == 2
