"""Which kernel computes attention, by device and dtype.

In float32 on a CPU the choice is fixed, so that two workers never differ in a stream's last bits: the fused kernel runs at
the speed of its two matrix products alone. Everywhere else several kernels exist, the fastest depends on the processor and
the shape, and it is measured once, at warm-up. On a CPU in bfloat16 the fused kernel may not use the processor's bfloat16
products, where two plain ones with a softmax between do.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable
from enum import StrEnum
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from shared.engine.model.attention import Kernel, attention

log = logging.getLogger(__name__)


class KernelName(StrEnum):
    """What can compute attention."""

    FUSED = "fused"  # whatever scaled_dot_product_attention takes by itself
    DENSE = "dense"  # two matrix products and a softmax
    CUDNN = "cudnn"
    FLASH = "flash"
    EFFICIENT = "efficient"


_BACKENDS = {
    KernelName.CUDNN: SDPBackend.CUDNN_ATTENTION,
    KernelName.FLASH: SDPBackend.FLASH_ATTENTION,
    KernelName.EFFICIENT: SDPBackend.EFFICIENT_ATTENTION,
}


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention by two matrix products and a softmax between. Shapes as :data:`Kernel`."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return (torch.softmax((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2), -1) @ v).transpose(1, 2)


def kernel_of(name: KernelName) -> Kernel:
    """The kernel of this name."""
    if name is KernelName.DENSE:
        return dense
    backend = _BACKENDS.get(name)
    return attention if backend is None else partial(_with, backend)


def fastest_kernel(
    device: torch.device, dtype: torch.dtype, *, batch: int, length: int, keys: int, heads: int, head_dim: int
) -> KernelName:
    """The fastest kernel for q of ``length`` over ``keys`` tokens, by measurement; see above for float32 on a CPU."""
    if device.type == "cpu" and dtype is torch.float32:
        return KernelName.FUSED
    q = torch.randn(batch, length, heads, head_dim, device=device, dtype=dtype)
    k, v = (torch.randn(batch, keys, heads, head_dim, device=device, dtype=dtype) for _ in range(2))
    best, least = KernelName.FUSED, float("inf")
    for name in (KernelName.FUSED, *(_BACKENDS if device.type == "cuda" else (KernelName.DENSE,))):
        took = _milliseconds(device, partial(kernel_of(name), q, k, v))
        log.debug("attention by %s: %s ms", name, took)
        if took is not None and took < least:
            best, least = name, took
    log.info("attention of %d over %d tokens: %s, %.3f ms", length, keys, best, least)
    return best


def _with(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return attention(q, k, v)


def _milliseconds(device: torch.device, work: Callable[[], Any], runs: int = 7) -> float | None:
    """Median time; None where the kernel does not take this shape or dtype."""
    times: list[float] = []
    try:
        for _ in range(runs + 2):
            began = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append((time.perf_counter() - began) * 1e3)
    except RuntimeError:
        return None
    return statistics.median(times[2:])
