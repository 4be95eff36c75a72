"""How much successive frames differ."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

# Above this many pixels only every n-th row is compared: the figure barely changes, the cost stays bounded.
MAX_PIXELS = 160_000


def frame_rmse(frame: np.ndarray, previous: np.ndarray) -> float:
    """RMSE of two uint8 [height, width, 3] frames with pixels taken as [−1, 1]."""
    rows = max(1, -(-frame.shape[0] * frame.shape[1] // MAX_PIXELS))
    # int16 holds every difference of two bytes; float32 sums of squares are exact enough per row block.
    difference = np.subtract(frame[::rows], previous[::rows], dtype=np.int16).astype(np.float32).ravel()
    return float(np.sqrt(np.dot(difference, difference) / difference.size)) / 127.5


def chunk_rmse(frames: Sequence[np.ndarray], previous: np.ndarray | None, padding: int) -> tuple[float, ...]:
    """One value per pixel frame of a chunk. ``previous`` is the last frame of the chunk before it; padding has 0."""
    values: list[float] = []
    for frame in frames:
        values.append(0.0 if previous is None else frame_rmse(frame, previous))
        previous = frame
    return (*values, *([0.0] * padding))
