"""How a stream's source moves: what goes along with every chunk."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

import cv2
import numpy as np

from services.ingest.rmse import chunk_rmse
from shared.media.flow import FlowFinder

log = logging.getLogger(__name__)


class Movement:
    """Holds the newest frame of one stream. ``with_flow``: the stream is steadied, and needs more than figures."""

    def __init__(self, with_flow: bool) -> None:
        self._finder = FlowFinder() if with_flow else None
        self._previous: np.ndarray | None = None

    async def of(self, frames: Sequence[np.ndarray], padding: int, skipped: bool) -> tuple[tuple[float, ...], bytes]:
        """Of the next chunk: one RMSE per pixel frame, and its flow's bytes (none if it is ``skipped``, or not needed)."""
        if self._previous is not None and self._previous.shape != frames[0].shape:
            self._previous = None  # the stream changed its size
        rmse = chunk_rmse(frames, self._previous, padding)
        self._previous = frames[-1]
        if self._finder is None or skipped:
            return rmse, b""
        try:
            flow = await asyncio.to_thread(self._finder.chunk, frames, padding)
        except cv2.error as error:
            log.error("the stream is not steadied from here on: %s", error)
            self._finder = None
            return rmse, b""
        return rmse, flow.to_bytes()
