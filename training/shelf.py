"""Pairs that are used again: drawing and filtering clips takes a tenth to a third of a training step, noise and prompts none.

A couple is one clip in two styles, as :class:`training.pairs.PairSource` draws it. Each is taken about ``uses`` times, in
other company, with other noise, another prompt and another task each time, and makes room for a new one then.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np

Kept = TypeVar("Kept")


@dataclass
class Shelf(Generic[Kept]):
    """Up to ``places`` couples of one size; ``draw`` (couples → their pairs) fills it. ``uses`` ≥ 1."""

    draw: Callable[[int], list[Kept]]
    places: int
    uses: int
    _couples: list[list[Kept]] = field(default_factory=list)
    _owed: float = 0.0
    _oldest: int = 0

    def take(self, rng: np.random.Generator, couples: int) -> list[Kept]:
        """The pairs of ``couples`` different couples, couple by couple. The first calls draw all they take."""
        self._owed += couples / self.uses
        if len(self._couples) < max(couples, self.places):
            self._owed = max(self._owed, 1.0 * couples)
        fresh = int(self._owed)
        self._owed -= fresh
        new = self.draw(fresh) if fresh else []
        for couple in (new[i : i + 2] for i in range(0, len(new), 2)):
            if len(self._couples) < max(couples, self.places):
                self._couples.append(couple)
            else:
                self._couples[self._oldest] = couple
                self._oldest = (self._oldest + 1) % len(self._couples)
        chosen = rng.choice(len(self._couples), couples, replace=False)
        return [pair for index in chosen for pair in self._couples[int(index)]]
