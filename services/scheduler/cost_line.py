"""The line through a curve's measured shapes: ``fixed + per_item·B + per_unit·units``, no part below 0. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

Point = tuple[int, float]
"""(items, units) of a forward."""

SIMPLEST_FIRST = ((2,), (0, 2), (1, 2), (0, 1, 2), (0,), (1,), (0, 1))
"""Which parts may be there, by preference: in proportion to the units when one shape is all that is known."""
MAX_WEIGHT = 5
AS_GOOD = 1.05
NEGLIGIBLE = 1e-6


@dataclass(frozen=True, slots=True)
class Line:
    """Milliseconds at speed 1."""

    fixed: float = 0.0
    per_item: float = 0.0
    per_unit: float = 0.0

    def at(self, items: int, units: float) -> float:
        """Of a forward of this shape."""
        return self.fixed + self.per_item * items + self.per_unit * units


def fit(cells: Sequence[tuple[Point, float, int]]) -> Line:
    """The line of the least relative error through cells ((items, units), ms, measurements); the simplest of equals.

    Non-negative least squares by trying every set of parts: with three there are seven.
    """
    gram = [[0.0] * 3 for _ in range(3)]
    right = [0.0] * 3
    total = 0.0
    for (items, units), ms, count in cells:
        if ms <= 0:
            continue
        weight = min(count, MAX_WEIGHT)
        row = (1.0 / ms, items / ms, units / ms)
        for i, j in product(range(3), range(3)):
            gram[i][j] += weight * row[i] * row[j]
        for i in range(3):
            right[i] += weight * row[i]
        total += weight
    if not total:
        return Line()
    found: list[tuple[float, list[float]]] = []
    for parts in SIMPLEST_FIRST:
        solved = _solve([[gram[i][j] for j in parts] for i in parts], [right[i] for i in parts])
        if solved is None or min(solved) < 0.0:
            continue
        full = [0.0] * 3
        for part, value in zip(parts, solved, strict=True):
            full[part] = value
        loss = total - 2 * sum(full[i] * right[i] for i in range(3))
        loss += sum(full[i] * full[j] * gram[i][j] for i, j in product(range(3), range(3)))
        found.append((max(loss, 0.0) / total, full))
    best = min(loss for loss, _ in found)
    return Line(*next(full for loss, full in found if loss <= AS_GOOD * best + NEGLIGIBLE))


def _solve(matrix: list[list[float]], right: list[float]) -> list[float] | None:
    """Gauss with scaled pivots; None when the parts cannot be told apart."""
    size = len(right)
    scale = [max(matrix[i][i], 1e-300) ** 0.5 for i in range(size)]
    rows = [[matrix[i][j] / (scale[i] * scale[j]) for j in range(size)] + [right[i] / scale[i]] for i in range(size)]
    for at in range(size):
        pivot = max(range(at, size), key=lambda i: abs(rows[i][at]))
        rows[at], rows[pivot] = rows[pivot], rows[at]
        if abs(rows[at][at]) < 1e-9:
            return None
        for below in range(at + 1, size):
            share = rows[below][at] / rows[at][at]
            rows[below] = [b - share * a for a, b in zip(rows[at], rows[below], strict=True)]
    solved = [0.0] * size
    for at in reversed(range(size)):
        known = sum(rows[at][j] * solved[j] for j in range(at + 1, size))
        solved[at] = (rows[at][size] - known) / rows[at][at]
    return [value / scale[i] for i, value in enumerate(solved)]
