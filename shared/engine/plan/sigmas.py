"""The noise levels of flow matching: σ runs linearly from 1 to 0 in 1000 entries and is then shifted."""

from __future__ import annotations

import functools
from bisect import bisect_left

TRAIN_STEPS = 1000
DEFAULT_SHIFT = 8.0


@functools.cache
def sigma_table(shift: float = DEFAULT_SHIFT) -> tuple[float, ...]:
    """1000 values, strictly decreasing from 1: σ' = shift·σ / (1 + (shift−1)·σ). Raises ValueError unless shift > 0."""
    if not shift > 0.0:
        raise ValueError(f"shift = {shift} will not do: a number above 0 is needed")
    plain = (1.0 - index / TRAIN_STEPS for index in range(TRAIN_STEPS))
    return tuple(shift * sigma / (1.0 + (shift - 1.0) * sigma) for sigma in plain)


@functools.cache
def sigma_of(timestep: float, shift: float = DEFAULT_SHIFT) -> float:
    """The σ of the table's entry whose timestep (1000·σ) is nearest to ``timestep`` (0…1000); the larger one on a tie.

    Not timestep/1000: the models were distilled on the table's levels, and t = 200 means σ = 0.19835. The time embedding
    still takes the nominal timestep. Raises ValueError outside 0…1000.
    """
    if not 0.0 <= timestep <= TRAIN_STEPS:
        raise ValueError(f"timestep {timestep} lies outside 0…{TRAIN_STEPS}")
    rising = _rising(shift)
    at = bisect_left(rising, timestep / TRAIN_STEPS)
    near = rising[max(at - 1, 0) : at + 1]
    return min(reversed(near), key=lambda sigma: abs(sigma * TRAIN_STEPS - timestep))


@functools.cache
def _rising(shift: float) -> tuple[float, ...]:
    return sigma_table(shift)[::-1]
