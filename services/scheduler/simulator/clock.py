"""Virtual time: a heap of events. What happens at the same instant happens in the order it was asked for."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any

NS_PER_MS = 1_000_000
NS_PER_S = 1_000_000_000


class VirtualClock:
    """``now`` in nanoseconds since the simulation began. An event is a function and its one argument."""

    __slots__ = ("_heap", "_order", "events", "now")

    def __init__(self) -> None:
        self.now = 0
        self.events = 0
        self._order = 0
        self._heap: list[tuple[int, int, Callable[[Any], None], Any]] = []

    def at(self, when: int, act: Callable[[Any], None], what: Any) -> None:
        """``act(what)`` happens at ``when``, or at once if that is past."""
        self._order += 1
        heapq.heappush(self._heap, (when, self._order, act, what))

    def run(self, until: int) -> None:
        """Everything that happens up to ``until``, which becomes now."""
        heap, pop = self._heap, heapq.heappop
        while heap and heap[0][0] <= until:
            when, _, act, what = pop(heap)
            if when > self.now:
                self.now = when
            self.events += 1
            act(what)
        self.now = max(self.now, until)
