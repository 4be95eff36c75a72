"""How a stream's source moves: what goes along with every chunk."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import numpy as np

from services.ingest.rmse import chunk_rmse
from shared.media.flow import FlowFinder


class Movement:
    """Holds the newest frame of one stream. ``with_flow``: the stream is steadied, and needs more than figures."""

    def __init__(self, with_flow: bool) -> None:
        self._finder = FlowFinder() if with_flow else None
        self._previous: np.ndarray | None = None

    async def of(self, frames: Sequence[np.ndarray], padding: int, skipped: bool) -> tuple[tuple[float, ...], bytes]:
        """Of the next chunk: one RMSE per pixel frame, and its flow's bytes (none if it is ``skipped``, or not needed)."""
        rmse = chunk_rmse(frames, self._previous, padding)
        self._previous = frames[-1]
        if self._finder is None or skipped:
            return rmse, b""
        flow = await asyncio.to_thread(self._finder.chunk, frames, padding)
        return rmse, flow.to_bytes()
