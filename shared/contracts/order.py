"""What a hop makes of a chunk number: new, seen before, or overtaken by a newer one.

Core NATS may lose, and our tests also repeat and delay, any message. Every hop whose state is causal passes a stream's
chunks through one gate, so that a repeated message costs nothing and a late one cannot run backwards through a cache.
"""

from __future__ import annotations

from enum import StrEnum

MAX_GAPS = 256


class Arrival(StrEnum):
    """How a number arrived."""

    NEW = "new"  # larger than all before it
    DUPLICATE = "duplicate"  # already passed
    OVERTAKEN = "overtaken"  # never passed, but a larger one has


class OrderGate:
    """Classifies ascending numbers of one stream. Bounded: it remembers the newest ``MAX_GAPS`` missing numbers."""

    def __init__(self, newest: int = -1) -> None:
        self.newest = newest
        self._missing: dict[int, None] = {}

    def arrive(self, number: int) -> Arrival:
        """Record ``number`` and say how it arrived. An overtaken number is reported as such once, then as duplicate."""
        if number == self.newest + 1:
            self.newest = number
            return Arrival.NEW
        if number > self.newest:
            for gap in range(max(self.newest + 1, number - MAX_GAPS), number):
                self._missing[gap] = None
            while len(self._missing) > MAX_GAPS:
                self._missing.pop(next(iter(self._missing)))
            self.newest = number
            return Arrival.NEW
        if number in self._missing:
            del self._missing[number]
            return Arrival.OVERTAKEN
        return Arrival.DUPLICATE
