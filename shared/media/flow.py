"""How a chunk's source moves: a coarse optical flow, small enough to travel with the chunk.

One vector per cell of 8×8 pixels, in quarter pixels, and how much of the source's own brightness changes along it. Dense
inverse search (Kroeger et al., 2016, as OpenCV has it) takes about a millisecond for a frame of 320×192.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

CELL = 8
"""Pixels per side of a cell; a little less where the picture's sides are no multiples."""
PER_PIXEL = 4
"""Steps of a vector per pixel: up to 32 pixels fit."""
LEAST_SIDE = 32
"""Pixels; the search fails on smaller pictures."""
MOST_PIXELS = 200_000
"""Larger pictures are searched at a half, a third, … of their size."""


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

        A stream's first frame, and one of another size than the one before, follows nothing; nor does a picture with a side
        below 32 pixels, which is too small to search.
        """
        size = cells_of(*frames[0].shape[:2])
        vectors = np.zeros((len(frames) + padding, *size, 2), np.int8)
        change = np.full((len(frames) + padding, *size), 255, np.uint8)
        for i, frame in enumerate(frames):
            shrunk, grey = _grey(frame)
            if self._before is not None and self._before.shape == grey.shape and min(grey.shape) >= LEAST_SIDE:
                vectors[i], change[i] = self._step(self._before, grey, size, shrunk)
            self._before = grey
        return Flow(vectors, change)

    def _step(
        self, before: np.ndarray, grey: np.ndarray, size: tuple[int, int], shrunk: int
    ) -> tuple[np.ndarray, np.ndarray]:
        rows, columns = size
        if self._grid.shape[:2] != grey.shape:
            self._grid = grid_of(*grey.shape)
        flow = self._search.calc(grey, before, np.zeros_like(self._grid)) * shrunk
        small = cv2.resize(flow, (columns, rows), interpolation=cv2.INTER_AREA)
        vectors = np.clip(np.rint(small * PER_PIXEL), -127, 127).astype(np.int8)
        # By the vectors as they travel: what they cannot say is not to be trusted.
        told = cv2.resize(vectors.astype(np.float32), grey.shape[::-1]) / (PER_PIXEL * shrunk)
        came = carried(before, self._grid + told)
        return vectors, cv2.resize(cv2.absdiff(came, grey), (columns, rows), interpolation=cv2.INTER_AREA)


def _grey(frame: np.ndarray) -> tuple[int, np.ndarray]:
    """A frame's brightness, shrunk by a whole number if it is large, and that number."""
    height, width = frame.shape[:2]
    shrunk = max(1, math.ceil((height * width / MOST_PIXELS) ** 0.5))
    grey = cv2.cvtColor(np.ascontiguousarray(frame), cv2.COLOR_RGB2GRAY)
    if shrunk == 1:
        return 1, grey
    return shrunk, cv2.resize(grey, (width // shrunk, height // shrunk), interpolation=cv2.INTER_AREA)
