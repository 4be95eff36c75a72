"""Steadies a generated video along its source's motion, so that what only moved does not flicker.

Each frame is mixed with the one shown before, carried along the source's flow (:mod:`shared.media.flow`): a recursive temporal
filter, as video denoisers have it. What a decoder gets wrong differs from frame to frame, and averages out; what moved stays
sharp, because it is carried along. Three things guard it (docs/adr/0031):

* where the source itself changed along the flow (something came into sight, a cut) the frame stays as it is;
* where the generated picture changed much, it stays as well: a new prompt is there at once, or after a few frames;
* a picture whose lines stand still while the source moves (the grid of pixel art) must not be carried along. Whether it
  moves with its source is measured as it goes.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from shared.media.flow import PER_PIXEL, Flow, carried, grid_of

SOURCE_TRUST = 0.1
"""Mean change of the source's brightness along the flow, of 1, from which nothing is carried."""
OWN_TRUST = 0.3
"""The same of the generated picture's colours, whose own flicker is in it."""
NEAR = 5
"""Pixels: the side of the square over which that change is averaged."""
MOVES = (0.68, 0.78)
"""Change along the flow over change in place, squared, where the source moves: up to the first a picture moves with its
source, from the second on it does not."""
FAR = 1.0
"""Pixels per frame from which a place counts for that."""
MEMORY = 0.9
TINY = 1e-3
EVERY = 4
"""Of the rows and columns every n-th is looked at for that."""


@dataclass(frozen=True)
class Place:
    """Where a frame stands in its stream: chunk and position in it. ``last``: the chunk has no frame behind it."""

    chunk: int
    position: int
    last: bool

    def follows(self, other: Place | None) -> bool:
        """Whether ``other`` is the frame right before this one."""
        if other is None:
            return False
        if self.chunk == other.chunk:
            return self.position == other.position + 1
        return self.chunk == other.chunk + 1 and self.position == 0 and other.last


class Steadier:
    """One stream's filter: holds the frame shown last. ``strength`` in [0, 1) is the share that comes from it."""

    def __init__(self, strength: float) -> None:
        if not 0 <= strength < 1:
            raise ValueError(f"a strength of {strength} will not do: 0 up to, not including, 1")
        self._strength = strength
        self._shown: np.ndarray | None = None
        self._place: Place | None = None
        self._grid = np.zeros((0, 0, 2), np.float32)
        self._along, self._still = 0.0, 0.0  # squared change of what is shown: carried along, and left in place
        steps = np.arange(256, dtype=np.float32) / 255
        self._trust = np.clip(1 - (steps / OWN_TRUST) ** 2, 0, 1).astype(np.float32)

    @property
    def moves(self) -> float:
        """How far the picture moves with its source, 0…1."""
        low, high = MOVES
        return float(np.clip((high - self._along / max(self._still, TINY)) / (high - low), 0, 1))

    def frame(self, pixels: np.ndarray, flow: Flow | None, place: Place) -> np.ndarray:
        """uint8 [H, W, 3] → what to show, the same shape; ``flow`` is the chunk's, None: not known.

        A frame whose predecessor was not shown comes out as it went in.
        """
        shown = pixels
        fits = self._shown is not None and self._shown.shape == pixels.shape and place.follows(self._place)
        if self._strength and flow is not None and fits and place.position < len(flow.vectors):
            shown = self._mixed(np.ascontiguousarray(pixels), flow, place.position)
        self._shown, self._place = shown, place
        return shown

    def _mixed(self, pixels: np.ndarray, flow: Flow, index: int) -> np.ndarray:
        height, width = pixels.shape[:2]
        if self._grid.shape[:2] != (height, width):
            self._grid = grid_of(height, width)
        assert self._shown is not None
        vectors = cv2.resize(flow.vectors[index].astype(np.float32), (width, height)) / PER_PIXEL
        came = carried(self._shown, self._grid + vectors)
        trusted = np.clip(1 - (flow.change[index] / np.float32(255 * SOURCE_TRUST)) ** 2, 0, 1).astype(np.float32)
        share = cv2.resize(trusted, (width, height))
        self._watch(pixels, came, vectors, share)
        changed = cv2.blur(cv2.cvtColor(cv2.absdiff(came, pixels), cv2.COLOR_RGB2GRAY), (NEAR, NEAR))
        share *= cv2.LUT(changed, self._trust) * np.float32(self._strength * self.moves)
        return cv2.blendLinear(came, pixels, share, 1 - share)

    def _watch(self, pixels: np.ndarray, came: np.ndarray, vectors: np.ndarray, share: np.ndarray) -> None:
        """Notes how well the frame before fits, carried along and left in place, where the source moves."""
        assert self._shown is not None
        some = (slice(EVERY // 2, None, EVERY), slice(EVERY // 2, None, EVERY))
        moving = (np.abs(vectors[some]).max(-1) > FAR) & (share[some] > 0)
        now = pixels[some].astype(np.float32)
        if not moving.any():
            return  # nothing new is known
        along = float(np.square(came[some] - now).mean(-1)[moving].sum()) / moving.size
        still = float(np.square(self._shown[some] - now).mean(-1)[moving].sum()) / moving.size
        self._along, self._still = self._along * MEMORY + along, self._still * MEMORY + still
