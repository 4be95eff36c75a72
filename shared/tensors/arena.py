"""Which slot a tensor gets: size classes, slots of equal size in segments, leases. Decides; touches no shared memory.

Sizes are rounded up to a class (four per power of two, so at most a fifth is lost). A segment holds slots of one class.
A slot is a 64-byte header and its data, both on 64-byte boundaries.
"""

from __future__ import annotations

from dataclasses import dataclass, field

HEADER = 64
SMALLEST = 4096 - HEADER
SEGMENT_BYTES = 4 * 1024 * 1024
MAX_SLOTS = 16


class ArenaFullError(RuntimeError):
    """No free slot, and no room for another segment."""


def class_of(size: int) -> int:
    """The data size of the smallest class that holds ``size`` bytes."""
    if size <= SMALLEST:
        return SMALLEST
    power = 1 << ((size + HEADER - 1).bit_length() - 1)
    step = power // 4
    return -(-(size + HEADER) // step) * step - HEADER


@dataclass(slots=True, eq=False)
class Slot:
    """A place in a segment. ``offset`` is that of its data; the header stands before it. ``generation`` 0: free."""

    number: int
    segment: Segment
    offset: int
    generation: int = 0
    expires_ns: int = 0
    size: int = 0

    @property
    def header(self) -> int:
        """The offset of its header."""
        return self.offset - HEADER


@dataclass(slots=True, eq=False)
class Segment:
    """A file of slots of one size class."""

    number: int
    slot_bytes: int
    total_bytes: int
    slots: list[Slot] = field(default_factory=list)
    leased: int = 0


@dataclass(slots=True)
class Grant:
    """A leased slot. ``create`` must be made, ``remove`` be unlinked before it is used."""

    slot: Slot
    create: Segment | None = None
    remove: tuple[Segment, ...] = ()


class Arena:
    """Leases slots within ``max_bytes``. Generations start at ``first_generation`` and never repeat."""

    def __init__(self, max_bytes: int, first_generation: int = 1) -> None:
        self.max_bytes = max_bytes
        self.total_bytes = 0
        self.leased: dict[int, Slot] = {}
        self._generation = first_generation
        self._segments: dict[int, Segment] = {}
        self._free: dict[int, list[Slot]] = {}
        self._next_slot = 0
        self._next_segment = 0

    def lease(self, size: int, expires_ns: int) -> Grant:
        """A slot for ``size`` bytes. Raises ArenaFullError when it would take more than ``max_bytes``."""
        slot_bytes = class_of(size)
        free = self._free.get(slot_bytes)
        if free:
            return Grant(self._take(free.pop(), size, expires_ns))
        stride = slot_bytes + HEADER
        room = self.max_bytes - self.total_bytes
        removed: tuple[Segment, ...] = ()
        if stride > room:
            removed = self._give_up_empty(stride - room)
            room = self.max_bytes - self.total_bytes
            if stride > room:
                raise ArenaFullError
        count = max(1, min(MAX_SLOTS, SEGMENT_BYTES // stride, room // stride))
        segment = self._grow(slot_bytes, count)
        slot = self._take(self._free[slot_bytes].pop(), size, expires_ns)
        return Grant(slot, segment, removed)

    def _grow(self, slot_bytes: int, count: int) -> Segment:
        stride = slot_bytes + HEADER
        segment = Segment(self._next_segment, slot_bytes, stride * count)
        self._next_segment += 1
        for index in range(count):
            segment.slots.append(Slot(self._next_slot, segment, index * stride + HEADER))
            self._next_slot += 1
        self._segments[segment.number] = segment
        # Handed out from the end: the first slot first.
        self._free.setdefault(slot_bytes, []).extend(reversed(segment.slots))
        self.total_bytes += segment.total_bytes
        return segment

    def _take(self, slot: Slot, size: int, expires_ns: int) -> Slot:
        slot.generation = self._generation
        self._generation += 1
        slot.expires_ns = expires_ns
        slot.size = size
        slot.segment.leased += 1
        self.leased[slot.number] = slot
        return slot

    def _give_up_empty(self, wanted: int) -> tuple[Segment, ...]:
        given: list[Segment] = []
        for segment in list(self._segments.values()):
            if wanted <= 0:
                break
            if segment.leased == 0:
                wanted -= segment.total_bytes
                given.append(segment)
                self.forget(segment)
        return tuple(given)

    def forget(self, segment: Segment) -> None:
        """Take a segment out, leases and all: it could not be made, or is given up."""
        for slot in segment.slots:
            self.leased.pop(slot.number, None)
            slot.generation = 0
        gone = {slot.number for slot in segment.slots}
        free = self._free[segment.slot_bytes]
        free[:] = [slot for slot in free if slot.number not in gone]
        self.total_bytes -= segment.total_bytes
        del self._segments[segment.number]

    def free(self, slot: Slot) -> None:
        """End a lease. The newest freed slot is the next to be used: its pages are warm."""
        if self.leased.pop(slot.number, None) is None:
            return
        slot.generation = 0
        slot.segment.leased -= 1
        self._free[slot.segment.slot_bytes].append(slot)

    def find(self, number: int, generation: int) -> Slot | None:
        """The leased slot of this number, if its lease is the one meant."""
        slot = self.leased.get(number)
        return slot if slot is not None and slot.generation == generation else None

    def segments(self) -> list[Segment]:
        """All segments there are."""
        return list(self._segments.values())
