"""What the machine can do at the model's own shapes, measured at the start of every run: the floor is counted from it.

Each ceiling is the best of several tries: on a shared machine the fastest is what the hardware can do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn import functional as fn

from bench.lockstep import timed
from shared.engine.plan.spec import ModelSpec

TRIES = 12
MEMORY_BYTES = {"cpu": 256 << 20, "cuda": 4 << 30}


@dataclass(frozen=True, slots=True)
class Ceilings:
    """``matmul`` and ``attention`` in TFLOP/s at the model's shapes and dtype, ``memory`` in GB/s (read plus written)."""

    matmul: float
    attention: float
    memory: float

    def floor_ms(self, flops: float) -> float:
        """The least time that this much arithmetic takes at the matmul ceiling."""
        return flops / self.matmul / 1e9


def measure_ceilings(
    spec: ModelSpec, size: tuple[int, int], items: int, device: torch.device, dtype: torch.dtype
) -> Ceilings:
    """Of this machine, for ``items`` latent frames in one forward."""
    tokens = spec.tokens(*size)
    x = torch.randn(items * tokens, spec.dim, device=device, dtype=dtype)
    wide = torch.randn(spec.ffn_dim, spec.dim, device=device, dtype=dtype)
    square = torch.randn(spec.dim, spec.dim, device=device, dtype=dtype)
    # The better of the block's two kinds of product is the ceiling.
    matmul = max(
        2 * x.shape[0] * weight.numel() / _least_s(device, partial(fn.linear, x, weight)) for weight in (wide, square)
    )
    heads = (spec.heads, spec.head_dim)
    q = torch.randn(items, tokens, *heads, device=device, dtype=dtype).transpose(1, 2)
    k = torch.randn(items, tokens * spec.ring, *heads, device=device, dtype=dtype).transpose(1, 2)
    spent = _least_s(device, partial(fn.scaled_dot_product_attention, q, k, k))
    attention = 4 * items * tokens * tokens * spec.ring * spec.dim / spent
    source = torch.zeros(MEMORY_BYTES.get(device.type, 1 << 28), dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    memory = 2 * source.numel() / _least_s(device, partial(target.copy_, source))
    return Ceilings(matmul / 1e12, attention / 1e12, memory / 1e9)


def _least_s(device: torch.device, work: Callable[[], Any]) -> float:
    for _ in range(2):
        timed(device, work)
    return min(timed(device, work)[0] for _ in range(TRIES)) / 1000
