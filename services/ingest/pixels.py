"""A chunk's pixels in shared memory, and what stands for them where there are none."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import numpy as np

from shared.contracts.refs import TensorPlace, TensorRef
from shared.tensors.port import TensorStore, TensorStoreFullError

FULL_RETRY_S = 0.02


def no_pixels(width: int, height: int) -> TensorRef:
    """What a chunk without a source carries: an empty tensor of the stream's size."""
    shape = (0, height, width, 3)
    return TensorRef(owner="ingest", host="", place=TensorPlace.INLINE, shape=shape, dtype="uint8", data=b"")


async def put_pixels(tensors: TensorStore, pixels: np.ndarray, stall_s: float) -> Any:
    """A shared-memory slot for the chunk; waits up to ``stall_s`` while the readers hold them all."""
    until = time.monotonic() + stall_s
    while True:
        try:
            return tensors.put(pixels, ttl_s=2 * stall_s)
        except TensorStoreFullError:
            if time.monotonic() > until:
                raise
            await asyncio.sleep(FULL_RETRY_S)
