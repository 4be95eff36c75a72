"""Bringing a decoded frame of any shape, depth and orientation to the stream's size."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter

from shared.contracts.commands import Fit
from shared.media.orientation import Orientation, of_frame
from shared.media.probe import display_size

# Shrinking by more than this, averaging areas is both faster and freer of moiré than a cubic kernel.
AREA_ABOVE = 2.0
# A crop scales the whole picture and cuts then: of one so much longer than the target nearly all would be scaled in vain.
MOST_SCALED = 16


class ShapeError(ValueError):
    """A picture whose shape cannot be brought to the target. The message is one line and names the fix."""


@dataclass(frozen=True, slots=True)
class FitPlan:
    """Scale the upright picture to ``scaled`` (width, height), then put it at ``offset`` (left, top) of the target.

    Offsets are negative where a crop cuts, positive where bars stand.
    """

    scaled: tuple[int, int]
    offset: tuple[int, int]


def plan_fit(width: int, height: int, target_width: int, target_height: int, fit: Fit) -> FitPlan:
    """How a displayed picture of ``width`` × ``height`` square pixels gets to the target with its aspect kept.

    Raises ShapeError for a crop that would leave less than a part in ``MOST_SCALED`` of it.
    """
    across, down = Fraction(target_width, width), Fraction(target_height, height)
    scale = max(across, down) if fit is Fit.CROP else min(across, down)
    if fit is Fit.CROP:
        scaled = max(target_width, round(width * scale)), max(target_height, round(height * scale))
        if scaled[0] * scaled[1] > MOST_SCALED * target_width * target_height:
            raise ShapeError(
                f"a picture of {width}×{height} is too far from the shape of {target_width}×{target_height} "
                "to be cropped: start the stream with fit pad"
            )
    else:
        scaled = min(target_width, max(1, round(width * scale))), min(target_height, max(1, round(height * scale)))
    return FitPlan(scaled, ((target_width - scaled[0]) // 2, (target_height - scaled[1]) // 2))


class Fitter:
    """Fits the frames of one source. Sizes may change in the middle of a source; each new shape is planned once."""

    def __init__(self, width: int, height: int, fit: Fit) -> None:
        self._width, self._height, self._fit = width, height, fit
        self._wanted = (width, height)
        self._reformatter = VideoReformatter()
        self._shape: tuple[Any, ...] = ()
        self._plan = FitPlan((width, height), (0, 0))
        self._stored = (width, height)
        self._turn = Orientation()
        self._interpolation = Interpolation.BICUBIC

    def resize(self, width: int, height: int) -> None:
        """Another target from the next frame on. May be called in another thread."""
        self._wanted = (width, height)

    def fit(self, frame: Any, sample_aspect: Fraction | None) -> np.ndarray:
        """A PyAV video frame → uint8 [height, width, 3] RGB, upright, in a buffer of its own. Raises ShapeError."""
        turn = of_frame(frame)
        if self._wanted != (self._width, self._height):
            (self._width, self._height), self._shape = self._wanted, ()
        shape = (frame.width, frame.height, frame.format.name, sample_aspect, turn)
        if shape != self._shape:
            self._replan(frame, sample_aspect, turn)
            self._shape = shape
        scaled = self._reformatter.reformat(
            frame, self._stored[0], self._stored[1], format="rgb24", interpolation=self._interpolation, threads=1
        )
        return self._place(self._turn.apply(scaled.to_ndarray()))

    def _replan(self, frame: Any, sample_aspect: Fraction | None, turn: Orientation) -> None:
        width, height = display_size(frame.width, frame.height, sample_aspect, turn.transpose)
        self._plan = plan_fit(width, height, self._width, self._height, self._fit)
        self._stored = self._plan.scaled[::-1] if turn.transpose else self._plan.scaled
        self._turn = turn
        shrink = max(frame.width / self._stored[0], frame.height / self._stored[1])
        self._interpolation = Interpolation.AREA if shrink > AREA_ABOVE else Interpolation.BICUBIC

    def _place(self, picture: np.ndarray) -> np.ndarray:
        left, top = self._plan.offset
        if self._fit is Fit.CROP:
            return np.ascontiguousarray(picture[-top : -top + self._height, -left : -left + self._width])
        if picture.shape[:2] == (self._height, self._width):
            return np.ascontiguousarray(picture)
        canvas = np.zeros((self._height, self._width, 3), np.uint8)
        canvas[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
        return canvas
