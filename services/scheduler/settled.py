"""Costs as promises are made by them: the cost model's, at the speed that each device has had for a while.

A batch is planned by how fast the device is this moment. A promise lasts: when many streams begin at once, forwards take up to
three times as long, which is over in a second, and who comes then must not be refused for it.
"""

from __future__ import annotations

from services.scheduler.cost_model import CostModel


class Settled:
    """A view of a cost model; see :class:`services.scheduler.pricing.Costs`."""

    def __init__(self, model: CostModel) -> None:
        self._model = model
        self.known, self.error = model.known, model.error

    def predict(self, key: str, units: float, items: int = 1) -> float:
        """Expected milliseconds."""
        return self._model.predict(key, units, items) * self._model.settled(key)
