"""A stream's life as an enum with legal moves, and who owns which field of its session."""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum


class StreamState(StrEnum):
    """starting → live ⇄ degraded ⇄ recovering → stopping → stopped | failed."""

    STARTING = "starting"
    LIVE = "live"
    DEGRADED = "degraded"
    RECOVERING = "recovering"
    STOPPING = "stopping"
    STOPPED = "stopped"
    FAILED = "failed"


_S = StreamState

# A stream that never got live may fail directly: it has no ledger to close. Any other fails by way of stopping.
LEGAL_MOVES: dict[StreamState, frozenset[StreamState]] = {
    _S.STARTING: frozenset({_S.LIVE, _S.STOPPING, _S.FAILED}),
    _S.LIVE: frozenset({_S.DEGRADED, _S.RECOVERING, _S.STOPPING}),
    _S.DEGRADED: frozenset({_S.LIVE, _S.RECOVERING, _S.STOPPING}),
    _S.RECOVERING: frozenset({_S.LIVE, _S.DEGRADED, _S.STOPPING}),
    _S.STOPPING: frozenset({_S.STOPPED, _S.FAILED}),
    _S.STOPPED: frozenset(),
    _S.FAILED: frozenset(),
}
TERMINAL_STATES: frozenset[StreamState] = frozenset(state for state, to in LEGAL_MOVES.items() if not to)


class IllegalMoveError(ValueError):
    """The stream is not in a state that this one may follow."""

    def __init__(self, stream: str, current: StreamState, to: StreamState) -> None:
        super().__init__(f"stream {stream}: illegal move {current} → {to}")
        self.current = current
        self.to = to


def check_move(stream: str, current: StreamState, to: StreamState) -> None:
    """Raises IllegalMoveError when ``to`` may not follow ``current``."""
    if to not in LEGAL_MOVES[current]:
        raise IllegalMoveError(stream, current, to)


def states_before(to: StreamState) -> frozenset[StreamState]:
    """The states that ``to`` may follow."""
    return frozenset(state for state, nexts in LEGAL_MOVES.items() if to in nexts)


class Owner(StrEnum):
    """Who may write a field. One owner per field."""

    SCHEDULER = "scheduler"
    MOTION = "motion"
    STAGE = "stage"
    DECODE = "decode"
    INGEST = "ingest"
    EGRESS = "egress"


_FIELDS: dict[Owner, tuple[str, ...]] = {
    Owner.SCHEDULER: (
        "spec",
        "state",
        "prompt",
        "prompt_version",
        "prompts",
        "settings",
        "epoch",
        "rope",
        "placement",
        "assignment",
        "tier",
        "promise",
        "destinations",
        "reason",
        "counters",
    ),
    Owner.MOTION: ("controller",),
    Owner.STAGE: ("sinks",),
    Owner.DECODE: ("window",),
    Owner.INGEST: ("source",),
    Owner.EGRESS: ("last_chunk", "stats"),
}
FIELD_OWNERS: dict[str, Owner] = {field: owner for owner, fields in _FIELDS.items() for field in fields}


class FieldOwnerError(ValueError):
    """A service tried to write a field that is not its own."""


def check_owner(owner: Owner, fields: Iterable[str]) -> None:
    """Raises FieldOwnerError unless ``owner`` owns every field. "sinks:3" is the part 3 of "sinks".

    "spec" and "state" are refused to all: ``create`` and ``move`` write them.
    """
    for field in fields:
        name = field.partition(":")[0]
        if name in ("spec", "state"):
            raise FieldOwnerError(f"field {field!r} is written by create and move only")
        belongs = FIELD_OWNERS.get(name)
        if belongs is None:
            raise FieldOwnerError(f"field {field!r} has no owner: name it in shared/session/state.py")
        if belongs is not owner:
            raise FieldOwnerError(f"field {field!r} belongs to {belongs}, not to {owner}")
