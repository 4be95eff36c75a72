"""A stream's states and the owners of its fields."""

from __future__ import annotations

import pytest

from shared.session.state import (
    FIELD_OWNERS,
    LEGAL_MOVES,
    TERMINAL_STATES,
    FieldOwnerError,
    IllegalMoveError,
    Owner,
    StreamState,
    check_move,
    check_owner,
    states_before,
)


def reachable(start: StreamState) -> set[StreamState]:
    seen, edge = {start}, [start]
    while edge:
        for to in LEGAL_MOVES[edge.pop()] - seen:
            seen.add(to)
            edge.append(to)
    return seen


def test_every_state_can_be_reached_and_every_life_can_end() -> None:
    assert reachable(StreamState.STARTING) == set(StreamState)
    for state in StreamState:
        assert reachable(state) & TERMINAL_STATES


def test_the_ends_are_stopped_and_failed_and_nothing_follows() -> None:
    assert {StreamState.STOPPED, StreamState.FAILED} == TERMINAL_STATES
    for state in StreamState:
        with pytest.raises(IllegalMoveError):
            check_move("s", StreamState.STOPPED, state)


def test_a_stream_that_was_live_ends_by_way_of_stopping() -> None:
    assert states_before(StreamState.STOPPED) == {StreamState.STOPPING}
    assert states_before(StreamState.FAILED) == {StreamState.STOPPING, StreamState.STARTING}


def test_an_illegal_move_names_the_stream_and_the_move() -> None:
    with pytest.raises(IllegalMoveError, match="stream s7: illegal move live → starting") as raised:
        check_move("s7", StreamState.LIVE, StreamState.STARTING)
    assert (raised.value.current, raised.value.to) == (StreamState.LIVE, StreamState.STARTING)


def test_each_field_has_one_owner_and_parts_of_it_have_the_same() -> None:
    check_owner(Owner.STAGE, ["sinks", "sinks:3"])
    check_owner(Owner.SCHEDULER, ["assignment", "epoch", "prompt", "prompt_version"])
    assert FIELD_OWNERS["controller"] is Owner.MOTION
    with pytest.raises(FieldOwnerError, match="belongs to stage"):
        check_owner(Owner.DECODE, ["window", "sinks:3"])
    with pytest.raises(FieldOwnerError, match="create and move"):
        check_owner(Owner.SCHEDULER, ["spec"])
