"""What work is predicted to take on one pipeline, in nanoseconds: the cost model's answers, kept until they change."""

from __future__ import annotations

from services.scheduler.cost_model import CostModel

NS_PER_MS = 1_000_000
MIN_GAIN = 0.05  # of one item's time: what sharing a forward must save, or the items had better follow one another


class Forecast:
    """Predictions for ``stages`` stages. ``units`` are latent tokens of one item's forward; a batch's items are alike."""

    def __init__(self, cost: CostModel, stages: int) -> None:
        self.cost = cost
        self.stages = stages
        self._keys = tuple(f"stage.{stage}" for stage in range(stages))
        self.version = -1  # the cost model's order_version that everything here is of
        self._forwards: dict[tuple[int, int], int] = {}
        self._slowest: dict[tuple[int, int], int] = {}
        self._firsts: dict[tuple[int, int], float] = {}
        self._decodes: dict[int, int] = {}
        self._gains: dict[tuple[int, int], bool] = {}
        self.margin = 1.0
        """What a prediction is multiplied by where being wrong costs others their deadline: the model's own error."""

    def renew(self) -> bool:
        """Forget what the cost model would answer differently by now. Returns whether there was any."""
        if self.version == self.cost.order_version:
            return False
        self.version = self.cost.order_version
        for kept in (self._forwards, self._slowest, self._firsts, self._decodes, self._gains):
            kept.clear()
        self.margin = 1.0 + (self.cost.error(self._keys[0]) if self.cost.known(self._keys[0]) else 0.0)
        return True

    def forward_ns(self, units: int, items: int) -> int:
        """One step of a batch, through every stage."""
        shape = (units, items)
        found = self._forwards.get(shape)
        if found is None:
            ms = sum(self.cost.predict(key, units * items, items) for key in self._keys)
            found = self._forwards[shape] = int(ms * NS_PER_MS)
        return found

    def slowest_ns(self, units: int, items: int) -> int:
        """One step of a batch on the slowest stage: what it keeps the pipeline from doing something else."""
        shape = (units, items)
        found = self._slowest.get(shape)
        if found is None:
            ms = max(self.cost.predict(key, units * items, items) for key in self._keys)
            found = self._slowest[shape] = int(ms * NS_PER_MS)
        return found

    def stage0_ms(self, units: int, items: int) -> float:
        """One step of a batch on the first stage, in milliseconds."""
        shape = (units, items)
        found = self._firsts.get(shape)
        if found is None:
            found = self._firsts[shape] = self.cost.predict(self._keys[0], units * items, items)
        return found

    def decode_ns(self, units: int) -> int:
        """Decoding a block of so many latent tokens."""
        found = self._decodes.get(units)
        if found is None:
            found = self._decodes[units] = int(self.cost.predict("decode", units) * NS_PER_MS)
        return found

    def gains(self, units: int, items: int) -> bool:
        """Whether ``items`` in one forward take clearly less than one of them after the rest.

        While no batch has been measured nobody knows, and one is tried.
        """
        shape = (units, items)
        found = self._gains.get(shape)
        if found is None:
            single = self.slowest_ns(units, 1)
            saved = self.slowest_ns(units, items - 1) + single - self.slowest_ns(units, items)
            known = all(self.cost.knows_batches(key) for key in self._keys)
            found = self._gains[shape] = not known or saved >= MIN_GAIN * single
        return found
