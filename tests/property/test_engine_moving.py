"""Any moves at any moments: a stream's x0 are those of one that was left alone, to the last bit."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.test_engine_moving import ADAPTIVE, CUTS, NANO, Driven, cut, moved, opened, rebalanced

ORDERS = [[range(1), range(1, 4)], [range(2), range(2, 4)], [range(3), range(3, 4)]]
MOVES = st.one_of(
    st.tuples(st.just("go on"), st.just(0)),
    st.tuples(st.just("aside"), st.just(0)),
    st.tuples(st.just("back"), st.just(0)),
    st.tuples(st.just("rebalance"), st.integers(0, len(ORDERS) - 1)),
    st.tuples(st.just("migrate"), st.integers(0, len(CUTS) - 1)),
)


@settings(max_examples=15, deadline=None)
@given(
    moves=st.lists(st.lists(MOVES, max_size=3), min_size=4, max_size=8),
    steps=st.integers(1, 3),
    frames=st.integers(1, 3),
    sinks=st.booleans(),
)
def test_any_moves_at_any_moments_change_nothing(
    moves: list[list[tuple[str, int]]], steps: int, frames: int, sinks: bool
) -> None:
    spec = ADAPTIVE if sinks and frames == 1 else NANO
    frames = min(frames, spec.ring - spec.sinks)
    still = Driven(opened(cut(spec, ORDERS[1]), "s"), steps=steps, frames=frames)
    moving = Driven(opened(cut(spec, ORDERS[1]), "s"), steps=steps, frames=frames)
    for between in moves:
        still.tick()
        moving.tick()
        for what, which in between:
            if what == "aside":
                for stage in moving.stages:
                    stage.suspend("s")
            elif what == "back":
                for stage in moving.stages:
                    stage.resume("s")
            elif what == "migrate":
                moving.stages = moved(moving.stages, CUTS[which])
            elif what == "rebalance" and len(moving.stages) == 2:
                rebalanced(moving.stages, ORDERS[which])
    assert len(still.shown) == len(moving.shown)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(moving.shown, still.shown, strict=True))
