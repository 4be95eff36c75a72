"""The session store in this process: for tests, and for running without Redis. Values pass through the stored form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from shared.clock import Clock, SystemClock
from shared.contracts.commands import StreamSpec
from shared.contracts.events import LedgerTotals
from shared.session.port import (
    COSTS_TTL_S,
    EMBEDDING_TTL_S,
    ENDED_TTL_S,
    NoSuchStreamError,
    StreamExistsError,
    decode_session,
    pack,
    totals_of,
    unpack,
    verdict_counts,
    with_zeros,
    without_zeros,
)
from shared.session.state import TERMINAL_STATES, Owner, StreamState, check_move, check_owner


@dataclass(slots=True)
class _Ledger:
    counts: dict[str, int] = field(default_factory=dict)
    source_drops: dict[str, int] = field(default_factory=dict)
    frames_in: int = 0
    closed: int = 0
    through: int = 0
    above: set[int] = field(default_factory=set)


@dataclass(slots=True)
class _Lease:
    holder: str
    term: int
    until: float


class MemoryStore:
    """See ``SessionStore``. ``clock`` drives leases and expiry; ``ended_ttl_s`` is how long ended streams are kept."""

    def __init__(self, clock: Clock | None = None, ended_ttl_s: float = ENDED_TTL_S) -> None:
        self._clock: Clock = clock or SystemClock()
        self._ended_ttl_s = ended_ttl_s
        self._sessions: dict[str, dict[str, bytes]] = {}
        self._ledgers: dict[str, _Ledger] = {}
        self._forget_at: dict[str, float] = {}
        self._embeddings: dict[str, tuple[float, str, tuple[int, ...], int, bytes]] = {}
        self._costs: dict[str, tuple[float, bytes]] = {}
        self._notes: dict[str, tuple[float, bytes]] = {}
        self._leases: dict[str, _Lease] = {}
        self._terms: dict[str, int] = {}

    def _forget_ended(self) -> None:
        now = self._clock.monotonic()
        for stream in [stream for stream, at in self._forget_at.items() if at <= now]:
            self._forget(stream)

    def _forget(self, stream: str) -> None:
        self._sessions.pop(stream, None)
        self._ledgers.pop(stream, None)
        self._forget_at.pop(stream, None)

    def _session(self, stream: str) -> dict[str, bytes]:
        self._forget_ended()
        session = self._sessions.get(stream)
        if session is None:
            raise NoSuchStreamError(f"stream {stream} is not known")
        return session

    def _state(self, stream: str) -> StreamState:
        return StreamState(unpack(self._session(stream)["state"]))

    async def create(self, stream: str, spec: StreamSpec) -> None:
        self._forget_ended()
        if stream in self._sessions and self._state(stream) not in TERMINAL_STATES:
            raise StreamExistsError(f"stream {stream} is under way")
        self._forget(stream)
        self._sessions[stream] = {"spec": pack(spec.model_dump()), "state": pack(StreamState.STARTING.value)}

    async def put(self, stream: str, owner: Owner, fields: Mapping[str, Any]) -> None:
        check_owner(owner, fields)
        packed = {name: pack(value) for name, value in fields.items()}
        self._session(stream).update(packed)

    async def get(self, stream: str) -> dict[str, Any] | None:
        self._forget_ended()
        session = self._sessions.get(stream)
        return None if session is None else decode_session(session)

    async def streams(self) -> list[str]:
        self._forget_ended()
        return sorted(self._sessions)

    async def move(self, stream: str, to: StreamState) -> StreamState:
        current = self._state(stream)
        check_move(stream, current, to)
        self._session(stream)["state"] = pack(to.value)
        if to in TERMINAL_STATES:
            self._forget_at[stream] = self._clock.monotonic() + self._ended_ttl_s
        return current

    async def delete(self, stream: str) -> None:
        self._forget(stream)

    async def put_embedding(self, digest: str, dtype: str, shape: Sequence[int], data: bytes) -> None:
        now = self._clock.monotonic()
        for old in [key for key, value in self._embeddings.items() if value[0] <= now]:
            del self._embeddings[old]
        self._embeddings[digest] = (now + EMBEDDING_TTL_S, dtype, tuple(shape), *without_zeros(bytes(data)))

    async def get_embedding(self, digest: str) -> tuple[str, tuple[int, ...], bytes] | None:
        found = self._embeddings.get(digest)
        now = self._clock.monotonic()
        if found is None or found[0] <= now:
            return None
        _, dtype, shape, size, data = found
        self._embeddings[digest] = (now + EMBEDDING_TTL_S, dtype, shape, size, data)
        return dtype, shape, with_zeros(size, data)

    async def put_costs(self, place: str, costs: Mapping[str, Any]) -> None:
        self._costs[place] = (self._clock.monotonic() + COSTS_TTL_S, pack(dict(costs)))

    async def get_costs(self, place: str) -> dict[str, Any] | None:
        until, packed = self._costs.get(place, (0.0, b""))
        return unpack(packed) if until > self._clock.monotonic() else None

    async def put_note(self, place: str, value: Any, ttl_s: float, *, if_absent: bool = False) -> bool:
        if if_absent and self._note(place) is not None:
            return False
        self._notes[place] = (self._clock.monotonic() + ttl_s, pack(value))
        return True

    async def get_note(self, place: str) -> Any:
        packed = self._note(place)
        return None if packed is None else unpack(packed)

    async def drop_note(self, place: str) -> bool:
        held = self._note(place) is not None
        self._notes.pop(place, None)
        return held

    async def notes(self, prefix: str) -> list[str]:
        return sorted(
            place for place in list(self._notes) if place.startswith(prefix) and self._note(place) is not None
        )

    def _note(self, place: str) -> bytes | None:
        until, packed = self._notes.get(place, (0.0, b""))
        if until > self._clock.monotonic():
            return packed
        self._notes.pop(place, None)
        return None

    def _held(self, name: str) -> _Lease | None:
        lease = self._leases.get(name)
        return lease if lease is not None and lease.until > self._clock.monotonic() else None

    async def acquire(self, name: str, holder: str, ttl_s: float) -> int | None:
        lease = self._held(name)
        if lease is not None and lease.holder != holder:
            return None
        term = self._terms[name] = self._terms.get(name, 0) + 1
        self._leases[name] = _Lease(holder, term, self._clock.monotonic() + ttl_s)
        return term

    async def renew(self, name: str, holder: str, term: int, ttl_s: float) -> bool:
        lease = self._held(name)
        if lease is None or (lease.holder, lease.term) != (holder, term):
            return False
        lease.until = self._clock.monotonic() + ttl_s
        return True

    async def release(self, name: str, holder: str, term: int) -> None:
        lease = self._held(name)
        if lease is not None and (lease.holder, lease.term) == (holder, term):
            del self._leases[name]

    def _ledger_to_write(self, stream: str) -> _Ledger:
        self._forget_ended()
        if stream not in self._sessions:
            self._forget_at[stream] = self._clock.monotonic() + self._ended_ttl_s
        return self._ledgers.setdefault(stream, _Ledger())

    async def close_chunk(self, stream: str, chunk: int, verdict: dict[str, int]) -> bool:
        counts = verdict_counts(verdict)
        ledger = self._ledger_to_write(stream)
        if chunk < ledger.through or chunk in ledger.above:
            return False
        ledger.above.add(chunk)
        ledger.closed += 1
        for name, frames in counts.items():
            ledger.counts[name] = ledger.counts.get(name, 0) + frames
        while ledger.through in ledger.above:
            ledger.above.remove(ledger.through)
            ledger.through += 1
        return True

    async def ledger(self, stream: str) -> tuple[LedgerTotals, int, int]:
        self._forget_ended()
        ledger = self._ledgers.get(stream, _Ledger())
        counts = dict(ledger.counts)
        for name, frames in ledger.source_drops.items():
            counts[name] = counts.get(name, 0) + frames
        return totals_of(counts, ledger.frames_in), ledger.closed, ledger.through

    async def put_ledger_frames_in(self, stream: str, frames_in: int, dropped: Mapping[str, int] | None = None) -> None:
        drops = verdict_counts(dropped or {})
        ledger = self._ledger_to_write(stream)
        ledger.frames_in = max(ledger.frames_in, frames_in)
        for name, frames in drops.items():
            ledger.source_drops[name] = max(ledger.source_drops.get(name, 0), frames)

    async def close(self) -> None:
        """Nothing to release."""
