"""The median of the newest values, kept in order as they come."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque


class RunningMedian:
    """Of at most ``most`` values."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._values: deque[float] = deque()
        self._ordered: list[float] = []

    def add(self, value: float) -> None:
        """One more; the oldest goes when there are too many."""
        self._values.append(value)
        insort(self._ordered, value)
        if len(self._values) > self._most:
            del self._ordered[bisect_left(self._ordered, self._values.popleft())]

    def scale(self, factor: float) -> None:
        """All values become ``factor`` (above 0) times as large."""
        self._values = deque(value * factor for value in self._values)
        self._ordered = [value * factor for value in self._ordered]

    def clear(self) -> None:
        """Forget all."""
        self._values.clear()
        self._ordered.clear()

    def value(self, otherwise: float) -> float:
        """The median; ``otherwise`` while there are no values."""
        return self._ordered[len(self._ordered) // 2] if self._ordered else otherwise
