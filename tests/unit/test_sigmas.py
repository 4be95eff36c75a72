"""The shifted noise levels: where they start and end, and that timesteps are looked up, not divided."""

from __future__ import annotations

from itertools import pairwise

import pytest

from shared.engine.plan.sigmas import sigma_of, sigma_table


def test_the_table_has_1000_entries_that_fall_from_one_but_never_reach_zero():
    table = sigma_table(8.0)
    assert len(table) == 1000
    assert table[0] == 1.0
    assert table[-1] == pytest.approx(8 * 0.001 / (1 + 7 * 0.001))
    assert all(a > b for a, b in pairwise(table))


def test_a_timestep_takes_the_nearest_entry():
    assert sigma_of(200) == pytest.approx(0.19835, abs=5e-6)
    assert sigma_of(1000) == 1.0
    assert sigma_of(0) == sigma_table()[-1]


@pytest.mark.parametrize("shift", [1.0, 3.0, 8.0])
def test_the_lookup_agrees_with_a_search_through_the_whole_table(shift: float):
    table = sigma_table(shift)
    for timestep in range(0, 1001, 7):
        assert sigma_of(timestep, shift) == min(table, key=lambda sigma: abs(1000 * sigma - timestep))


def test_without_shift_a_timestep_is_its_own_level():
    assert sigma_of(700, 1.0) == pytest.approx(0.7)


def test_outside_the_range_there_is_no_level():
    with pytest.raises(ValueError, match="outside"):
        sigma_of(1001)
    with pytest.raises(ValueError, match="above 0"):
        sigma_table(0.0)
