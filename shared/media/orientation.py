"""How a picture is to be turned before it is shown: the display matrix of phones and cameras."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, slots=True)
class Orientation:
    """Swap rows and columns first (``transpose``), then mirror left-right and top-bottom."""

    transpose: bool = False
    flip_lr: bool = False
    flip_ud: bool = False

    def apply(self, pixels: np.ndarray) -> np.ndarray:
        """[height, width, …] → the upright picture (a view)."""
        if self.transpose:
            pixels = np.swapaxes(pixels, 0, 1)
        if self.flip_lr:
            pixels = pixels[:, ::-1]
        if self.flip_ud:
            pixels = pixels[::-1]
        return pixels

    @property
    def degrees(self) -> int:
        """The clockwise turn in degrees; of a mirrored picture, the turn without the mirror."""
        if not self.transpose:
            return 180 if self.flip_ud else 0
        return 90 if self.flip_lr else 270


def from_matrix(a: int, b: int, c: int, d: int) -> Orientation:
    """Of the 2×2 part of a display matrix: a pixel (x, y) of the stored picture is shown at (a·x + c·y, b·x + d·y)."""
    if abs(a) >= abs(b):
        return Orientation(False, a < 0, d < 0)
    return Orientation(True, c < 0, b < 0)


def of_frame(frame: Any) -> Orientation:
    """Of a decoded PyAV frame; upright when it says nothing."""
    try:
        data = frame.side_data["DISPLAYMATRIX"]
    except KeyError:
        return Orientation()
    matrix = np.frombuffer(bytes(data), dtype=np.int32)
    if matrix.size < 9:
        return Orientation()
    return from_matrix(int(matrix[0]), int(matrix[1]), int(matrix[3]), int(matrix[4]))
