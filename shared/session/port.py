"""The session store as services see it. ``RedisStore`` and ``MemoryStore`` pass one conformance suite."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import msgpack

from shared.contracts.commands import StreamSpec
from shared.contracts.events import LedgerTotals
from shared.session.state import Owner, StreamState

VERDICTS = ("on_time", "late", "skipped")
COSTS_TTL_S = 30 * 86_400.0
ENDED_TTL_S = 3600.0
"""How long a stream that ended can still be read: its session, its ledger and its place in the list."""
EMBEDDING_TTL_S = 600.0
"""How long a prompt's embedding is kept after it was last asked for. Whatever prepares a prompt (a start, a change, a new
size, a recovery) has it encoded first, which makes it anew where it is gone, and reads it within seconds."""


class StoreError(RuntimeError):
    """Base of what a store may raise. Every message is one line."""


class StoreUnavailableError(StoreError):
    """The store cannot be reached or does not answer."""


class StreamExistsError(StoreError):
    """A stream of this id is under way."""


class NoSuchStreamError(StoreError, LookupError):
    """No stream of this id is known."""


def pack(value: Any) -> bytes:
    """A field's stored form. Raises TypeError for what msgpack cannot hold."""
    packed: Any = msgpack.packb(value, use_bin_type=True)
    return packed


def unpack(data: bytes) -> Any:
    """The inverse of ``pack``; arrays come back as lists."""
    return msgpack.unpackb(data, raw=False, strict_map_key=False)


def without_zeros(data: bytes) -> tuple[int, bytes]:
    """(size, what is before the zeros at the end): an embedding is mostly padding."""
    return len(data), data.rstrip(b"\0")


def with_zeros(size: int, data: bytes) -> bytes:
    """The inverse of ``without_zeros``."""
    return data.ljust(size, b"\0")


def decode_session(fields: Mapping[str, bytes]) -> dict[str, Any]:
    """A session's stored fields as values: ``spec`` a StreamSpec, ``state`` a StreamState, the rest as was put."""
    session = {name: unpack(data) for name, data in fields.items()}
    session["spec"] = StreamSpec.model_validate(session["spec"])
    session["state"] = StreamState(session["state"])
    return session


def verdict_counts(verdict: Mapping[str, int]) -> dict[str, int]:
    """A chunk's verdict with its keys checked: on_time, late, skipped, or "service:reason" for a drop.

    Raises ValueError on another key or a negative number.
    """
    for name, frames in verdict.items():
        if name not in VERDICTS and ":" not in name:
            raise ValueError(f'{name!r} is no verdict: on_time, late, skipped or "service:reason"')
        if frames < 0:
            raise ValueError(f"{name!r}: {frames} frames cannot be")
    return {name: frames for name, frames in verdict.items() if frames}


def totals_of(counts: Mapping[str, int], frames_in: int) -> LedgerTotals:
    """Ledger counters as the contract's totals."""
    return LedgerTotals(
        frames_in=frames_in,
        on_time=counts.get("on_time", 0),
        late=counts.get("late", 0),
        skipped=counts.get("skipped", 0),
        dropped={name: frames for name, frames in sorted(counts.items()) if name not in VERDICTS},
    )


class SessionStore(Protocol):
    """State that outlives a process. Every method may raise StoreUnavailableError.

    A session that moved to stopped or failed is forgotten after the store's ``ended_ttl_s``, ledger and all; what is
    written to it meanwhile does not prolong its time. A ledger that has no session lasts that long after its last write.
    """

    async def create(self, stream: str, spec: StreamSpec) -> None:
        """Begin a session in state starting. One that ended is replaced, ledger included; else StreamExistsError."""
        ...

    async def put(self, stream: str, owner: Owner, fields: Mapping[str, Any]) -> None:
        """Write fields of one owner at once. Raises FieldOwnerError, NoSuchStreamError."""
        ...

    async def get(self, stream: str) -> dict[str, Any] | None:
        """All fields: ``spec`` a StreamSpec, ``state`` a StreamState, the rest as they were put (tuples as lists)."""
        ...

    async def streams(self) -> list[str]:
        """The ids of all sessions, sorted; ended ones until they are forgotten."""
        ...

    async def move(self, stream: str, to: StreamState) -> StreamState:
        """Change the state, atomically, and return the one before. Raises IllegalMoveError, NoSuchStreamError.

        A terminal state starts the time after which the session is forgotten.
        """
        ...

    async def delete(self, stream: str) -> None:
        """Forget a session and its ledger."""
        ...

    async def put_embedding(self, digest: str, dtype: str, shape: Sequence[int], data: bytes) -> None:
        """Keep a prompt embedding for EMBEDDING_TTL_S under its content hash. Zeros at its end (padding) take no room."""
        ...

    async def get_embedding(self, digest: str) -> tuple[str, tuple[int, ...], bytes] | None:
        """(dtype, shape, bytes) as they were put, zeros included; reading it renews its time."""
        ...

    async def put_costs(self, place: str, costs: Mapping[str, Any]) -> None:
        """Keep a cost model's snapshot for 30 days under (device, model, size), so that a restart knows costs at once."""
        ...

    async def get_costs(self, place: str) -> dict[str, Any] | None:
        """The snapshot kept for this place, or None."""
        ...

    async def put_note(self, place: str, value: Any, ttl_s: float, *, if_absent: bool = False) -> bool:
        """Keep a value under ``place`` for ``ttl_s``; ``if_absent``: False, and nothing changes, when there is one.

        For what the gateway must not lose and no stream's owner writes: share links, timelines, answers by their key.
        """
        ...

    async def get_note(self, place: str) -> Any:
        """The value kept there, as msgpack gives it back; None when there is none."""
        ...

    async def drop_note(self, place: str) -> bool:
        """Forget it; whether there was one."""
        ...

    async def notes(self, prefix: str) -> list[str]:
        """The places that begin with ``prefix``, sorted."""
        ...

    async def acquire(self, name: str, holder: str, ttl_s: float) -> int | None:
        """Take a free lease (or one's own again) for ``ttl_s``: a new term, larger than all before; None if it is held."""
        ...

    async def renew(self, name: str, holder: str, term: int, ttl_s: float) -> bool:
        """Extend a lease; False when it was lost."""
        ...

    async def release(self, name: str, holder: str, term: int) -> None:
        """Give a lease back, if it is still one's own."""
        ...

    async def close_chunk(self, stream: str, chunk: int, verdict: dict[str, int]) -> bool:
        """Close a chunk in the ledger: frames by "on_time", "late", "skipped" or "service:reason".

        The first verdict wins (True); any later one changes nothing (False). Counting, and moving the watermark over
        closed chunks, is one transaction.
        """
        ...

    async def ledger(self, stream: str) -> tuple[LedgerTotals, int, int]:
        """(totals, closed chunks, through): every chunk below ``through`` is closed. Zeros for an unknown stream."""
        ...

    async def put_ledger_frames_in(self, stream: str, frames_in: int, dropped: Mapping[str, int] | None = None) -> None:
        """Set ingest's running totals: frames captured, and what it dropped before numbering ("ingest:reason").

        They are cumulative; a smaller number than the stored one (a message that came late) is ignored.
        """
        ...

    async def close(self) -> None:
        """Release connections. Idempotent."""
        ...
