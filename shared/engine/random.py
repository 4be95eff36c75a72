"""Keyed noise: ε depends on (seed, latent frame, step) and on nothing else. For a picture that stands still the frame is 0.

So a stream's pixels do not depend on whom it was batched with, on which device it ran, or on a restart. The numbers are
drawn on the CPU by a counter-based generator whose key holds the triple, and are then copied to the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from shared.engine.plan.items import Item

_MASK = (1 << 64) - 1


class NoiseSource(Protocol):
    """Where a stage takes ε from."""

    def draw(self, items: Sequence[Item], step_offset: int, shape: tuple[int, int, int]) -> Tensor:
        """ε for every item, [B, T, *shape] float32 on the CPU, for the item's step plus ``step_offset``.

        Offset 0 is what the input is noised with, offset 1 what x0 is re-noised with. All items have the same T.
        """
        ...


def epsilon(seed: int, frame: int, step: int, shape: tuple[int, ...]) -> Tensor:
    """Standard normal noise of one latent frame at one step: float32 of ``shape`` on the CPU.

    ``frame`` is the stream's absolute latent index, ``step`` the step index whose input it makes.
    """
    if frame < 0 or step < 0:
        raise ValueError(f"noise of latent frame {frame}, step {step}: both count from 0")
    key = np.array([seed & _MASK, ((frame << 8) | step) & _MASK], dtype=np.uint64)
    generator = np.random.Generator(np.random.Philox(key=key))
    return torch.from_numpy(generator.standard_normal(shape, dtype=np.float32))


class KeyedNoise:
    """The serving source: :func:`epsilon` of each frame of each item."""

    def draw(self, items: Sequence[Item], step_offset: int, shape: tuple[int, int, int]) -> Tensor:
        """See :class:`NoiseSource`."""
        return torch.stack(
            [
                torch.stack([epsilon(item.seed, frame, item.step + step_offset, shape) for frame in item.noise_frames])
                for item in items
            ]
        )
