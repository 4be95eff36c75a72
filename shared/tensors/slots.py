"""The owner's side of shared memory: its segments, the slots leased in them, and what is held until a lease ends."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shared.tensors import shm
from shared.tensors.arena import Arena, Grant, Segment, Slot

OnEnd = Callable[[bool], None]
"""Called once when a lease ends; True when a reader ended it through the slot's header, so has opened what it held."""


class OwnSlots:
    """Leased slots of one owner. Not thread-safe: the store holds its lock around every call."""

    def __init__(self, shm_dir: Path, run_id: str, owner: str, max_bytes: int, first_generation: int) -> None:
        self._dir, self._run_id, self._owner = shm_dir, run_id, owner
        self._life = secrets.token_hex(3)
        self._mapped: dict[int, shm.Mapping] = {}
        self._held: dict[int, tuple[Any, OnEnd | None]] = {}
        self.arena = Arena(max_bytes, first_generation)

    def lease(self, size: int, expires_ns: int) -> tuple[Slot, shm.Mapping]:
        """A slot and its memory. Raises ArenaFullError, and OSError when the file system has no room."""
        grant = self.arena.lease(size, expires_ns)
        self._apply(grant)
        return grant.slot, self._mapped[grant.slot.segment.number]

    def hold(self, slot: Slot, value: Any, on_end: OnEnd | None) -> None:
        """Keep an object for as long as the slot is leased."""
        self._held[slot.number] = (value, on_end)

    def held(self, slot: Slot) -> Any:
        """The object kept with the slot; None where there is none."""
        value, _ = self._held.get(slot.number, (None, None))
        return value

    def memory(self, slot: Slot) -> shm.Mapping:
        """The mapping the slot lies in."""
        return self._mapped[slot.segment.number]

    def segment(self, slot: Slot) -> str:
        """The file name that others map it by."""
        return self._name(slot.segment.number)

    def collect(self) -> int:
        """Free what readers have released, so that the next lease can reuse it; how many."""
        over = [
            slot for slot in self.arena.leased.values() if self.memory(slot).released(slot.header) == slot.generation
        ]
        for slot in over:
            self.end(slot, opened=True)
        return len(over)

    def expired(self, now_ns: int) -> int:
        """End the leases whose time is over; how many."""
        over = [slot for slot in self.arena.leased.values() if slot.expires_ns <= now_ns]
        for slot in over:
            self.end(slot)
        return len(over)

    def end(self, slot: Slot, *, opened: bool = False) -> None:
        """End a lease: from here on its references are stale."""
        self.memory(slot).set_generation(slot.header, 0)
        _, on_end = self._held.pop(slot.number, (None, None))
        self.arena.free(slot)
        if on_end is not None:
            on_end(opened)

    def close(self) -> None:
        """End every lease and unlink every segment."""
        self.collect()
        for slot in list(self.arena.leased.values()):
            self.end(slot)
        for number in list(self._mapped):
            self._unlink(number)

    def _apply(self, grant: Grant) -> None:
        for segment in grant.remove:
            self._unlink(segment.number)
        if grant.create is not None:
            self._create(grant.create)

    def _create(self, segment: Segment) -> None:
        try:
            path = self._dir / self._name(segment.number)
            self._mapped[segment.number] = shm.create(path, segment.total_bytes)
        except OSError:
            self.arena.forget(segment)
            raise

    def _name(self, segment: int) -> str:
        return shm.segment_name(self._run_id, self._owner, f"{self._life}{segment}")

    def _unlink(self, segment: int) -> None:
        mapping = self._mapped.pop(segment)
        (self._dir / self._name(segment)).unlink(missing_ok=True)
        mapping.close()
