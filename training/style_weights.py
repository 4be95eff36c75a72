"""How much each style's error counts. Quality is told in decibels, style by style, so errors count by their ratios.

A squared error by itself hears line styles only: pencil's is twelve times watercolour's. Divided by what the style's error
has been of late, it has the gradient of the error's logarithm, which is what decibels are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

POWER = 0.8
"""1 would be decibels themselves; a little less lets what is seen most count most."""
LIMITS = (0.2, 5.0)


class StyleWeights:
    """Running errors of ``styles`` styles, and the weights that follow."""

    def __init__(self, styles: int, memory: float = 0.98) -> None:
        self.errors, self._memory = torch.zeros(styles), memory

    def note(self, styles: Sequence[int], errors: Tensor) -> None:
        """Takes in a batch: ``errors`` [B], squared and above zero."""
        for style, error in zip(styles, errors.tolist(), strict=True):
            old = float(self.errors[style])
            self.errors[style] = old * self._memory + error * (1 - self._memory) if old else error

    def of(self, styles: Sequence[int]) -> Tensor:
        """Weights [B], about 1 on average over the styles; 1 for a style that was never seen."""
        known = self.errors[self.errors > 0]
        if not len(known):
            return torch.ones(len(styles))
        middle = known.log().mean().exp()
        errors = torch.where(self.errors > 0, self.errors, middle)
        return (middle / errors).pow(POWER).clamp(*LIMITS)[list(styles)]
