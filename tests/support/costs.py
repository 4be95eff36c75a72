"""Known costs, for tests of what decides by them."""

from __future__ import annotations

from dataclasses import dataclass, field

from services.scheduler.pricing import Demand, Host, Shape


@dataclass
class KnownCosts:
    """Milliseconds = fixed + per_token · units by role; ``unknown``: nothing has been measured; ``off``: the error."""

    stage_fixed: float = 1.0
    stage_per_token: float = 0.1
    codec_per_token: float = 0.05
    unknown: bool = False
    slower: dict[str, float] = field(default_factory=dict)
    off: float = 0.0

    def predict(self, key: str, units: float, items: int = 1) -> float:
        if self.unknown:
            return 0.0
        stage = key.startswith("stage")
        ms = self.stage_fixed + self.stage_per_token * units if stage else self.codec_per_token * units
        return ms * self.slower.get(key, 1.0)

    def settled(self, key: str) -> float:
        return 1.0

    def known(self, key: str) -> bool:
        return not self.unknown

    def error(self, key: str) -> float:
        return self.off


def demand(**changes: object) -> Demand:
    """160×96 at 8 fps, 2 steps."""
    plain: dict[str, object] = {"width": 160, "height": 96, "tokens": 60, "fps": 8.0, "steps": 2, "deadline_ms": 900.0}
    return Demand(**{**plain, **changes})  # type: ignore[arg-type]


def shape(stages: int = 1, max_batch: int = 8, host: Host | None = None) -> Shape:
    """Encode on the first stage's worker, decode on the last's."""
    return Shape(stages, 0, stages - 1, max_batch, (host,) if host else (), (1,) * stages)
