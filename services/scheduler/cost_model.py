"""The cost model: how long a role will take, fitted online from what it took. Never a constant.

Each key (a stage, or a role) has the line ``milliseconds = fixed + per_unit · units`` fitted by exponentially weighted
least squares; ``units`` are latent tokens in the forward. A measurement more than three times its own prediction enters
clipped, so that one stall does not poison the line, yet a lasting slowdown still moves it.
"""

from __future__ import annotations

from dataclasses import dataclass

FORGET = 0.97  # weight of the past at each new measurement: about the last 30 count
CLIP = 3.0
MIN_OBSERVATIONS = 3


@dataclass(slots=True)
class _Line:
    """Weighted sums of one key."""

    weight: float = 0.0
    x: float = 0.0
    y: float = 0.0
    xx: float = 0.0
    xy: float = 0.0
    count: int = 0

    def observe(self, units: float, ms: float) -> None:
        if self.count >= MIN_OBSERVATIONS:
            ms = min(ms, CLIP * max(self.predict(units), 0.01))
        self.weight = self.weight * FORGET + 1.0
        self.x = self.x * FORGET + units
        self.y = self.y * FORGET + ms
        self.xx = self.xx * FORGET + units * units
        self.xy = self.xy * FORGET + units * ms
        self.count += 1

    def predict(self, units: float) -> float:
        mean_x, mean_y = self.x / self.weight, self.y / self.weight
        spread = self.xx / self.weight - mean_x * mean_x
        if spread <= 1e-6 * max(mean_x * mean_x, 1.0):
            return mean_y * units / mean_x if mean_x > 0 else mean_y  # one size seen so far: proportional to it
        slope = max(0.0, (self.xy / self.weight - mean_x * mean_y) / spread)
        return max(0.0, mean_y + slope * (units - mean_x))


class CostModel:
    """Predicted milliseconds by key. A key nobody has measured enough costs 0: optimism admits, measurement corrects."""

    def __init__(self) -> None:
        self._lines: dict[str, _Line] = {}

    def observe(self, key: str, units: float, ms: float) -> None:
        """One measurement: ``units`` of work took ``ms`` milliseconds."""
        if units > 0 and ms >= 0:
            self._lines.setdefault(key, _Line()).observe(units, ms)

    def predict(self, key: str, units: float) -> float:
        """Expected milliseconds for ``units`` of work."""
        line = self._lines.get(key)
        return line.predict(units) if line is not None and line.count >= MIN_OBSERVATIONS else 0.0

    def known(self, key: str) -> bool:
        """Whether enough has been measured to predict."""
        line = self._lines.get(key)
        return line is not None and line.count >= MIN_OBSERVATIONS
