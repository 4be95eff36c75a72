"""Cuts: never worse than any other, always whole, and not moved for nothing."""

from __future__ import annotations

import itertools
import math
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.scheduler.placement import (
    CutsError,
    WorkerCost,
    best_cuts,
    check_cuts,
    choose_pipeline,
    cuts_of,
    moved_blocks,
    ranges_of,
    stage_costs,
)
from shared.engine.plan.split import split_blocks

COST = st.floats(0.01, 10.0)


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[WorkerCost], int, list[float], tuple[int, ...]]:
    layers = draw(st.integers(1, 9))
    stages = draw(st.integers(1, min(4, layers)))
    workers = [
        WorkerCost(draw(COST), draw(st.sampled_from([0.0, 1.0, 12.5])), draw(st.sampled_from([0, 0, 3, 5])))
        for _ in range(stages)
    ]
    weights = draw(st.one_of(st.just([]), st.lists(COST, min_size=layers, max_size=layers)))
    current = tuple(sorted(draw(st.permutations(range(1, layers)))[: stages - 1]))
    return workers, layers, weights, current


def every(layers: int, stages: int) -> list[tuple[int, ...]]:
    return list(itertools.combinations(range(1, layers), stages - 1))


@given(cases())
def test_no_other_cuts_are_better_and_no_equal_ones_move_less(
    case: tuple[list[WorkerCost], int, list[float], tuple[int, ...]],
) -> None:
    workers, layers, weights, current = case

    def slowest(cuts: tuple[int, ...]) -> float:
        sizes = [len(blocks) for blocks in ranges_of(cuts, layers)]
        if any(w.most_blocks and n > w.most_blocks for w, n in zip(workers, sizes, strict=True)):
            return math.inf
        return max(stage_costs(cuts, workers, layers, weights))

    possible = {cuts: slowest(cuts) for cuts in every(layers, len(workers))}
    least = min(possible.values())
    if math.isinf(least):
        with pytest.raises(CutsError, match="do not fit"):
            best_cuts(workers, layers, weights, current)
        return
    chosen = best_cuts(workers, layers, weights, current)
    assert possible[chosen] <= least * (1 + 1e-6)
    moves = {cuts: len(moved_blocks(current, cuts, layers)) for cuts, cost in possible.items() if cost <= least}
    assert len(moved_blocks(current, chosen, layers)) <= min(moves.values())


@given(st.integers(1, 40), st.integers(1, 8))
def test_alike_workers_get_even_shares_and_cuts_and_ranges_are_inverse(layers: int, stages: int) -> None:
    if stages > layers:
        with pytest.raises(CutsError, match=f"1…{layers} stages"):
            best_cuts([WorkerCost(1.0)] * stages, layers)
        return
    start = cuts_of(split_blocks(layers, stages))
    assert best_cuts([WorkerCost(1.0)] * stages, layers, current=start) == start
    assert cuts_of(ranges_of(start, layers)) == start
    assert check_cuts(start, layers, stages) == start
    assert sum(len(blocks) for blocks in ranges_of(start, layers)) == layers


@given(st.lists(st.integers(-2, 9), max_size=4), st.integers(1, 4))
def test_cuts_that_leave_a_stage_empty_or_a_block_alone_are_refused(cuts: list[int], stages: int) -> None:
    fine = len(cuts) == stages - 1 and tuple(cuts) in every(6, stages)
    if fine:
        assert check_cuts(cuts, 6, stages) == tuple(cuts)
    else:
        with pytest.raises(CutsError, match="give"):
            check_cuts(cuts, 6, stages)


def test_encode_and_decode_are_priced_in() -> None:
    alike = [WorkerCost(1.0), WorkerCost(1.0), WorkerCost(1.0)]
    assert best_cuts(alike, 30) == (10, 20)
    # 6 of encode and 12 of decode: each worker holds 16 in all.
    assert best_cuts([WorkerCost(1.0, 6.0), WorkerCost(1.0), WorkerCost(1.0, 12.0)], 30) == (10, 26)


def test_a_worker_of_half_the_speed_gets_half_the_blocks() -> None:
    assert best_cuts([WorkerCost(1.0), WorkerCost(2.0)], 30, current=(15,)) == (20,)
    assert moved_blocks((15,), (20,), 30) == dict.fromkeys(range(15, 20), (1, 0))


def test_eight_stages_of_forty_blocks_are_placed_in_time() -> None:
    workers = [WorkerCost(1.0 + 0.1 * stage) for stage in range(8)]
    begin = time.process_time()
    best_cuts(workers, 40)
    assert time.process_time() - begin < 1.0


def test_a_stream_goes_where_the_least_is_spoken_for() -> None:
    assert choose_pipeline({"p1": 0.2, "p0": 0.2, "p2": 0.9}) == "p0"
    assert choose_pipeline({"p1": 0.2, "p0": 0.2}, avoid=frozenset({"p0"})) == "p1"
    assert choose_pipeline({}) is None
