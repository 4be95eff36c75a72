"""Whatever is leased and freed, slots never overlap, generations never repeat, and the limit holds."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from shared.tensors.arena import HEADER, SMALLEST, Arena, ArenaFullError, Slot, class_of

LIMIT = 8 << 20


@given(st.integers(0, 1 << 34))
def test_a_class_holds_its_size_and_wastes_at_most_a_fifth(size: int) -> None:
    data = class_of(size)
    assert data >= size
    assert (data + HEADER) % 64 == 0
    if size > SMALLEST:
        assert data + HEADER <= (size + HEADER) * 1.25
    assert class_of(data) == data


class ArenaMachine(RuleBasedStateMachine):
    """Leases and frees in any order."""

    slots = Bundle("slots")

    def __init__(self) -> None:
        super().__init__()
        self.arena = Arena(LIMIT)
        self.live: dict[int, Slot] = {}
        self.seen: set[int] = set()

    @rule(target=slots, size=st.one_of(st.integers(0, 20_000), st.integers(0, 3 << 20)))
    def lease(self, size: int) -> Slot | None:
        try:
            grant = self.arena.lease(size, 0)
        except ArenaFullError:
            assert self.arena.total_bytes + class_of(size) + HEADER > LIMIT
            return None
        for segment in grant.remove:
            assert segment.leased == 0
        slot = grant.slot
        assert slot.generation not in self.seen
        self.seen.add(slot.generation)
        assert slot.segment.slot_bytes >= size
        assert slot.offset + slot.segment.slot_bytes <= slot.segment.total_bytes
        self.live[slot.number] = slot
        return slot

    @rule(slot=consumes(slots))
    def free(self, slot: Slot | None) -> None:
        if slot is None or slot.number not in self.live:
            return
        generation = slot.generation
        assert self.arena.find(slot.number, generation) is slot
        self.arena.free(slot)
        self.arena.free(slot)
        del self.live[slot.number]
        assert self.arena.find(slot.number, generation) is None

    @invariant()
    def nothing_overlaps(self) -> None:
        assert self.arena.leased == self.live
        places = sorted(
            (slot.segment.number, slot.header, slot.offset + slot.segment.slot_bytes) for slot in self.live.values()
        )
        for (number, _, end), (other, start, _) in zip(places, places[1:], strict=False):
            assert number != other or end <= start

    @invariant()
    def the_limit_holds(self) -> None:
        assert self.arena.total_bytes == sum(segment.total_bytes for segment in self.arena.segments()) <= LIMIT


TestArena = ArenaMachine.TestCase
TestArena.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
