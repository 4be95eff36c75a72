"""Similarity skip: when nothing moves, a chunk is numbered and closed as skipped, and the last picture stands. Pure.

After StreamDiffusion's similarity filter, with two differences. What is compared is the tile that differs most, not the whole
picture: a small thing that begins to move is seen at once. And nothing is left to chance: a chunk is skipped only if each of
its frames is like the last frame that was *sent*, so that slow changes add up and are seen, and the first chunk in which
something moves is always sent.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

TILE = 16  # pixels, the side of a tile; frames have sides that are multiples of it
MAX_PIXELS = 160_000  # above it, only every second (fourth, …) row of a frame is compared
SETTLE_CHUNKS = (
    4  # sent after the last movement or change, before anything is skipped: until then the picture still changes
)


def tile_difference(frame: np.ndarray, reference: np.ndarray) -> float:
    """The largest RMSE of all 16×16 tiles of two uint8 [height, width, 3] frames, with pixels taken as [−1, 1]."""
    height, width = frame.shape[:2]
    step = 1
    while height // step * width > MAX_PIXELS and step < TILE:
        step *= 2
    difference = np.subtract(frame[::step], reference[::step], dtype=np.int16).astype(np.float32)
    rows, columns = TILE // step, TILE
    tiles = np.square(difference, out=difference)[: height // TILE * rows, : width // TILE * columns]
    means = tiles.reshape(height // TILE, rows, width // TILE, columns * 3).mean((1, 3))
    return float(np.sqrt(means.max())) / 127.5


class SimilarityFilter:
    """One stream's. ``threshold`` 0: nothing is skipped. At the latest after ``longest_ns`` a chunk is sent all the same."""

    def __init__(self, threshold: float, longest_ns: int) -> None:
        self.threshold = threshold
        self._longest_ns = longest_ns
        self.reference: np.ndarray | None = None
        self._sent_ns = 0
        self._settle = SETTLE_CHUNKS
        self.skipped = 0  # frames

    def refresh(self) -> None:
        """Something else changed (a prompt, say): skip nothing until that is seen."""
        self._settle = SETTLE_CHUNKS

    def skips(self, frames: Sequence[np.ndarray], captured_ns: int) -> bool:
        """Whether this chunk is skipped; ``captured_ns`` is when its last frame was. Each chunk is asked for once."""
        if self.threshold <= 0:
            return False
        reference = self.reference
        similar = reference is not None and all(tile_difference(frame, reference) < self.threshold for frame in frames)
        if similar and self._settle == 0 and captured_ns - self._sent_ns < self._longest_ns:
            self.skipped += len(frames)
            return True
        # A picture that is refreshed after a long time is settled already.
        self._settle = max(0, self._settle - 1) if similar else SETTLE_CHUNKS
        self.reference, self._sent_ns = frames[-1], captured_ns
        return False
