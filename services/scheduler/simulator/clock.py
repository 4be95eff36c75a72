"""Virtual time: events by slots of a millisecond, the one that is now as a heap.

What happens at the same instant happens in the order it was asked for. One heap of all that is to come costs a large fleet a
walk through cold memory for every event; most events lie in a later slot, where they are only appended.
"""

from __future__ import annotations

from collections.abc import Callable
from heapq import heapify, heappop, heappush
from typing import Any

NS_PER_MS = 1_000_000
NS_PER_S = 1_000_000_000


_Event = tuple[int, int, Callable[[Any], None], Any]
SLOT_BITS = 20  # of nanoseconds


class VirtualClock:
    """``now`` in nanoseconds since the simulation began. An event is a function and its one argument."""

    __slots__ = ("_heap", "_later", "_order", "_slot", "_slots", "now")

    def __init__(self) -> None:
        self.now = 0
        self._order = 0
        self._slot = 0  # what is up to its end is in the heap
        self._heap: list[_Event] = []
        self._slots: list[int] = []  # later ones with events, as a heap
        self._later: dict[int, list[_Event]] = {}

    @property
    def events(self) -> int:
        """How many have happened."""
        return self._order - len(self._heap) - sum(map(len, self._later.values()))

    def at(self, when: int, act: Callable[[Any], None], what: Any) -> None:
        """``act(what)`` happens at ``when``, or at once if that is past."""
        self._order = order = self._order + 1
        slot = when >> SLOT_BITS
        if slot <= self._slot:
            heappush(self._heap, (when, order, act, what))
        elif (later := self._later.get(slot)) is not None:
            later.append((when, order, act, what))
        else:
            self._later[slot] = [(when, order, act, what)]
            heappush(self._slots, slot)

    def run(self, until: int) -> None:
        """Everything that happens up to ``until``, which becomes now."""
        last = until >> SLOT_BITS
        while True:
            heap = self._heap
            while heap and heap[0][0] <= until:
                when, _, act, what = heappop(heap)
                if when > self.now:
                    self.now = when
                act(what)
            if heap or not self._slots or self._slots[0] > last:
                break
            self._slot = heappop(self._slots)
            self._heap = self._later.pop(self._slot)
            heapify(self._heap)
        self.now = max(self.now, until)
