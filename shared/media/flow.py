"""How a chunk's source moves: a coarse optical flow, small enough to travel with the chunk.

One vector per cell of 8×8 pixels, in quarter pixels, and how much of the source's own brightness changes along it. Dense
inverse search (Kroeger et al., 2016, as OpenCV has it) takes about a millisecond for a frame of 320×192.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

CELL = 8
"""Pixels per side of a cell; at the right and the lower border cells may be smaller."""
PER_PIXEL = 4
"""Steps of a vector per pixel: up to 32 pixels fit."""


class FlowError(ValueError):
    """Bytes that are no flow of these frames."""


@dataclass(frozen=True)
class Flow:
    """Of n frames. ``vectors`` int8 [n, rows, columns, 2], (x, y): where a cell was one frame before. ``change`` uint8
    [n, rows, columns]: how much of its brightness changed on the way, of 255; 255 everywhere in a frame that follows nothing.
    """

    vectors: np.ndarray
    change: np.ndarray

    def to_bytes(self) -> bytes:
        """Three bytes per cell, for a message."""
        return self.vectors.tobytes() + self.change.tobytes()

    @classmethod
    def from_bytes(cls, data: bytes, frames: int, height: int, width: int) -> Flow:
        """The inverse of :meth:`to_bytes`. Raises FlowError for data of another size."""
        rows, columns = cells_of(height, width)
        cells = frames * rows * columns
        if len(data) != 3 * cells:
            raise FlowError(f"{len(data)} bytes are no flow of {frames} frames of {width}×{height}")
        whole = np.frombuffer(data, np.uint8)
        vectors = whole[: 2 * cells].view(np.int8).reshape(frames, rows, columns, 2)
        return cls(vectors, whole[2 * cells :].reshape(frames, rows, columns))


def cells_of(height: int, width: int) -> tuple[int, int]:
    """(rows, columns) of cells of a picture in pixels."""
    return -(-height // CELL), -(-width // CELL)


def grid_of(height: int, width: int) -> np.ndarray:
    """Every pixel's own place (x, y), float32 [H, W, 2]."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    return np.stack([x, y], -1)


def carried(image: np.ndarray, places: np.ndarray) -> np.ndarray:
    """An image [H, W, …] read at places (x, y) [H, W, 2] between its pixels; what lies beyond its border is the border."""
    # The second map may be None: one array holds both coordinates. OpenCV's stubs do not know.
    return cv2.remap(image, places, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)  # pyright: ignore


class FlowFinder:
    """Finds the flow of one stream's frames; keeps the newest one. Not for several threads at a time."""

    def __init__(self) -> None:
        self._search = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_ULTRAFAST)
        self._before: np.ndarray | None = None
        self._grid = np.zeros((0, 0, 2), np.float32)

    def chunk(self, frames: Sequence[np.ndarray], padding: int = 0) -> Flow:
        """The flow of consecutive frames, uint8 [H, W, 3] each; ``padding`` copies of the last one follow them.

        A stream's first frame, and one of another size than the one before, follows nothing.
        """
        rows, columns = cells_of(*frames[0].shape[:2])
        vectors = np.zeros((len(frames) + padding, rows, columns, 2), np.int8)
        change = np.zeros((len(frames) + padding, rows, columns), np.uint8)
        for i, frame in enumerate(frames):
            grey = cv2.cvtColor(np.ascontiguousarray(frame), cv2.COLOR_RGB2GRAY)
            if self._before is None or self._before.shape != grey.shape:
                change[i] = 255
            else:
                vectors[i], change[i] = self._step(self._before, grey)
            self._before = grey
        return Flow(vectors, change)

    def _step(self, before: np.ndarray, grey: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if self._grid.shape[:2] != grey.shape:
            self._grid = grid_of(*grey.shape)
        flow = self._search.calc(grey, before, np.zeros_like(self._grid))
        came = carried(before, self._grid + flow)
        rows, columns = cells_of(*grey.shape)
        small = cv2.resize(flow, (columns, rows), interpolation=cv2.INTER_AREA)
        change = cv2.resize(cv2.absdiff(came, grey), (columns, rows), interpolation=cv2.INTER_AREA)
        return np.clip(np.rint(small * PER_PIXEL), -127, 127).astype(np.int8), change
