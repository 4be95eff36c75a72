"""A drawn scene that moves and begins again without a seam: hills, a house, and somebody who looks around.

Made of nothing but numbers, so that a style has something to work on where there is no camera and no file.
"""

from __future__ import annotations

import numpy as np

LOOP_S = 8.0
KEPT_BYTES = 96 << 20  # a loop up to this size is drawn once and kept

Canvas = np.ndarray
Colour = tuple[float, float, float]

SKIN: Colour = (0.94, 0.74, 0.61)


class Scene:
    """The scene at one size and rate; ``draw`` gives uint8 [height, width, 3]. Coordinates are in parts of the height."""

    def __init__(self, width: int, height: int, fps: float) -> None:
        self.width, self.height = width, height
        self.loop = max(1, round(LOOP_S * fps))
        self._x = (np.arange(width, dtype=np.float32)[None, :] + 0.5 - width / 2) / height  # 0 in the middle
        self._y = (np.arange(height, dtype=np.float32)[:, None] + 0.5) / height
        self._sky = self._painted_sky()
        self._kept: dict[int, np.ndarray] | None = {} if self.loop * width * height * 3 <= KEPT_BYTES else None

    def draw(self, index: int) -> np.ndarray:
        """Picture ``index``; it is not to be written to."""
        place = index % self.loop
        if self._kept is None:
            return self._paint(place / self.loop)
        found = self._kept.get(place)
        if found is None:
            found = self._kept[place] = self._paint(place / self.loop)
        return found

    def _painted_sky(self) -> Canvas:
        top, low = np.array([0.36, 0.53, 0.78]), np.array([0.98, 0.84, 0.70])
        part = np.clip(self._y / 0.6, 0, 1)[..., None]
        return np.broadcast_to((top + (low - top) * part).astype(np.float32), (self.height, self.width, 3)).copy()

    def _paint(self, t: float) -> np.ndarray:
        """The scene at ``t`` of its loop, 0…1."""
        turn = 2 * np.pi * t
        canvas = self._sky.copy()
        self._disc(canvas, 0.42 + 0.12 * np.sin(turn), 0.22 - 0.03 * np.cos(turn), 0.1, 0.1, (1.0, 0.94, 0.66))
        hills = ((0.52, 0.4, (0.50, 0.60, 0.68)), (0.62, 2.0, (0.36, 0.56, 0.42)), (0.76, 4.1, (0.52, 0.66, 0.30)))
        for base, phase, colour in hills:
            swell = 0.05 * np.sin(4 * self._x + phase + turn) + 0.02 * np.sin(9 * self._x + 2 * phase + turn)
            self._cover(canvas, slice(None), slice(None), (self._y - base - swell) * self.height + 0.5, colour)
        self._house(canvas, -0.52 + 0.03 * np.sin(turn), 0.80)
        self._person(canvas, t)
        return (np.clip(canvas, 0, 1) * 255).astype(np.uint8)

    def _house(self, canvas: Canvas, x: float, y: float) -> None:
        self._box(canvas, x - 0.16, y - 0.22, x + 0.16, y, (0.85, 0.54, 0.38))
        rows, columns = self._window(x - 0.21, y - 0.36, x + 0.21, y - 0.21)
        inside = (self._y[rows] - (y - 0.36)) * 1.4 - np.abs(self._x[:, columns] - x)
        self._cover(canvas, rows, columns, inside * self.height, (0.48, 0.19, 0.19))
        self._box(canvas, x - 0.11, y - 0.16, x - 0.03, y - 0.08, (0.99, 0.92, 0.62))
        self._box(canvas, x + 0.03, y - 0.15, x + 0.10, y, (0.32, 0.19, 0.13))

    def _person(self, canvas: Canvas, t: float) -> None:
        turn = 2 * np.pi * t
        look = 0.05 * np.sin(turn)
        x, y = 0.16 + 0.05 * np.sin(turn), 0.52 + 0.012 * np.sin(3 * turn)
        self._disc(canvas, x, y + 0.46, 0.30, 0.24, (0.20, 0.32, 0.58))
        self._disc(canvas, x, y + 0.20, 0.09, 0.14, (0.84, 0.62, 0.50))
        self._disc(canvas, x, y - 0.05, 0.235, 0.285, (0.23, 0.14, 0.10))
        self._disc(canvas, x + 0.1 * look, y + 0.02, 0.185, 0.235, SKIN)
        for side in (-1, 1):
            self._disc(canvas, x + side * 0.095 + 0.5 * look, y + 0.085, 0.045, 0.034, (0.95, 0.66, 0.56))
        blink = 1.0 if (t * 3) % 1.0 < 0.94 else 0.15
        for side in (-1, 1):
            eye = x + side * 0.075 + look * 0.8
            self._disc(canvas, eye, y - 0.02, 0.038, 0.028 * blink, (1.0, 1.0, 1.0))
            self._disc(canvas, eye + look * 0.3, y - 0.02, 0.018, 0.022 * blink, (0.10, 0.16, 0.24))
            self._disc(canvas, eye + side * 0.006, y - 0.08, 0.045, 0.010, (0.23, 0.14, 0.10))
        self._disc(canvas, x + 1.2 * look, y + 0.05, 0.022, 0.045, (0.84, 0.60, 0.48))
        smile = 0.030 + 0.012 * np.sin(2 * turn)
        self._disc(canvas, x + 0.9 * look, y + 0.135, 0.066, smile, (0.72, 0.24, 0.27))
        self._disc(canvas, x + 0.9 * look, y + 0.122, 0.062, smile - 0.004, SKIN)

    # --- shapes, each over its own window of the canvas

    def _window(self, left: float, top: float, right: float, bottom: float) -> tuple[slice, slice]:
        first, last = round(left * self.height + self.width / 2) - 1, round(right * self.height + self.width / 2) + 1
        rows = slice(max(0, round(top * self.height) - 1), max(0, round(bottom * self.height) + 1))
        return rows, slice(max(0, first), max(0, last))

    def _cover(self, canvas: Canvas, rows: slice, columns: slice, pixels: np.ndarray, colour: Colour) -> None:
        """Paint where ``pixels``, the distance into the shape, is above 0; its edge is one pixel soft."""
        part = canvas[rows, columns]
        part += np.clip(pixels, 0, 1)[..., None] * (np.asarray(colour, dtype=np.float32) - part)

    def _box(self, canvas: Canvas, left: float, top: float, right: float, bottom: float, colour: Colour) -> None:
        rows, columns = self._window(left, top, right, bottom)
        x, y = self._x[:, columns], self._y[rows]
        inside = np.minimum(np.minimum(x - left, right - x), np.minimum(y - top, bottom - y))
        self._cover(canvas, rows, columns, inside * self.height + 0.5, colour)

    def _disc(self, canvas: Canvas, x: float, y: float, rx: float, ry: float, colour: Colour) -> None:
        rows, columns = self._window(x - rx, y - ry, x + rx, y + ry)
        far = np.sqrt(((self._x[:, columns] - x) / rx) ** 2 + ((self._y[rows] - y) / ry) ** 2)
        self._cover(canvas, rows, columns, (1.0 - far) * min(rx, ry) * self.height + 0.5, colour)
