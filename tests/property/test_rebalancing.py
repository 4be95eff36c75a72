"""A move of blocks goes its way in order, or not at all; what changes hands is told once, and completely."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.scheduler.placement import ranges_of
from services.scheduler.rebalancing import (
    IllegalPhaseError,
    Phase,
    Rebalancing,
    gains,
    transfers,
    whole,
)

LAYERS = 12
STEPS = ("begin", "mend", "prepared", "quiet", "moved", "done", "failed")


@st.composite
def two_cuts(draw: st.DrawFn) -> tuple[tuple[range, ...], tuple[range, ...]]:
    stages = draw(st.integers(1, 5))
    every = list(itertools.combinations(range(1, LAYERS), stages - 1))
    return ranges_of(draw(st.sampled_from(every)), LAYERS), ranges_of(draw(st.sampled_from(every)), LAYERS)


@given(two_cuts())
def test_after_the_transfers_every_worker_has_its_blocks(cuts: tuple[tuple[range, ...], tuple[range, ...]]) -> None:
    before, after = cuts
    assert whole(before, LAYERS)
    held = [set(blocks) for blocks in before]
    pieces = transfers(before, after)
    for piece in pieces:
        assert set(piece.blocks) <= held[piece.source], "what goes away was there"
        assert piece.source != piece.target
        assert piece.target in gains(before, after)
    for piece in pieces:
        held[piece.source] -= set(piece.blocks)
        held[piece.target] |= set(piece.blocks)
    assert [sorted(blocks) for blocks in held] == [list(blocks) for blocks in after]
    assert len({(p.source, p.target) for p in pieces}) == len(pieces), "one piece for each pair of workers"


def test_blocks_that_two_have_need_no_transfer_and_holes_are_seen() -> None:
    came_back = (range(8), range(6, 12))  # the first moved on while the second was started anew
    assert not whole(came_back, LAYERS)
    assert transfers(came_back, (range(6), range(6, 12))) == ()
    assert not whole((range(5), range(6, 12)), LAYERS)
    assert not whole((range(6), range(6, 11)), LAYERS)
    assert not whole((range(0), range(12)), LAYERS)


@given(st.lists(st.sampled_from(STEPS), max_size=25))
def test_no_order_of_events_leads_astray(steps: list[str]) -> None:
    """Each step is taken or refused; a move ends idle, and the way back is told only while there is one."""
    state, now = Rebalancing(), 0.0
    before, after = ranges_of((4,), LAYERS), ranges_of((7,), LAYERS)
    for step in steps:
        now += 1.0
        was = state.phase
        try:
            if step in ("begin", "mend"):
                getattr(state, step)(before, after, "a reason", now)
            elif step == "failed":
                repairs = state.failed("a stone in the way", now)
                assert repairs is (was is Phase.CUTTING)
                assert state.phase is (Phase.REPAIRING if repairs else Phase.IDLE)
            else:
                getattr(state, step)(now)
        except IllegalPhaseError:
            assert state.phase is was, "what was refused has changed nothing"
            continue
        assert state.phase is not was
        assert state.busy is (state.phase is not Phase.IDLE)
        assert (state.limit_s(5.0) > 0) is state.busy
        assert state.since == now
        if was in (Phase.CUTTING, Phase.REPAIRING) and state.phase is Phase.IDLE and step == "done":
            assert "7…11" in state.last


def test_what_took_how_long_is_told() -> None:
    state = Rebalancing()
    with pytest.raises(ValueError, match="nothing would move"):
        state.begin([range(4)], [range(4)], "", 0.0)
    state.begin(ranges_of((4,), LAYERS), ranges_of((6,), LAYERS), "slow", 1.0)
    state.prepared(9.0)
    state.quiet(9.1)
    state.moved(9.2)
    state.done(9.25)
    assert state.last == "moved to 0…5, 6…11, the pipeline stood still for 250 ms"
    state.begin(ranges_of((6,), LAYERS), ranges_of((4,), LAYERS), "slow", 20.0)
    assert not state.failed("no room", 21.0)
    assert state.last == "not moved, preparing failed: no room"
