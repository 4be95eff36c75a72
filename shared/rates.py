"""How often somebody may do something: one token bucket per name. Pure; time is passed in."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field


@dataclass(slots=True)
class _Bucket:
    tokens: float
    at_s: float


@dataclass(slots=True)
class Rates:
    """``per_s`` a second, ``burst`` at once. ``most`` names are remembered; who was away longest is forgotten first."""

    per_s: float
    burst: int
    most: int = 4096
    refused: int = 0
    _buckets: OrderedDict[str, _Bucket] = field(default_factory=lambda: OrderedDict[str, _Bucket]())

    def take(self, name: str, now_s: float) -> float:
        """0 when it may be done now, and is counted; else the seconds until it may."""
        bucket = self._buckets.get(name)
        if bucket is None:
            bucket = self._buckets[name] = _Bucket(float(self.burst), now_s)
            while len(self._buckets) > self.most:
                self._buckets.popitem(last=False)
        self._buckets.move_to_end(name)
        passed = max(0.0, now_s - bucket.at_s)
        bucket.tokens, bucket.at_s = min(float(self.burst), bucket.tokens + passed * self.per_s), now_s
        if bucket.tokens >= 1.0:
            bucket.tokens -= 1.0
            return 0.0
        self.refused += 1
        return (1.0 - bucket.tokens) / self.per_s
