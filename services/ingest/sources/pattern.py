"""A moving test pattern whose frames can be told apart by looking at them."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

import numpy as np

from services.ingest.sources.port import AudioTrack, Picture, Sound
from services.ingest.sources.scene import Scene

DEFAULT_FPS = 16.0
BITS = 16


def bit_cell(width: int, height: int) -> tuple[int, int]:
    """(width, height) in pixels of one of the 16 cells that spell the frame index along the top edge."""
    return width // BITS, max(4, height // 12)


def read_index(pixels: np.ndarray) -> int:
    """The frame index modulo 65 536 that :func:`draw` wrote into the top edge of uint8 [height, width, 3]."""
    cell_width, cell_height = bit_cell(pixels.shape[1], pixels.shape[0])
    middle = pixels[cell_height // 2, cell_width // 2 : cell_width * BITS : cell_width].mean(axis=-1)
    return sum(int(value > 127) << (BITS - 1 - bit) for bit, value in enumerate(middle[:BITS]))


class _Canvas:
    """The parts of the pattern that do not move, computed once."""

    def __init__(self, width: int, height: int) -> None:
        self.x = np.arange(width, dtype=np.float32)[None, :]
        self.y = np.arange(height, dtype=np.float32)[:, None]
        self.width, self.height = width, height

    def draw(self, index: int) -> np.ndarray:
        """uint8 [height, width, 3]: drifting colour bands, a circling disc, the index in bits along the top."""
        phase = index * 2.0
        red = np.broadcast_to(96.0 + 64.0 * np.sin((self.x + phase) * (2 * np.pi / 80.0)), (self.height, self.width))
        green = np.broadcast_to(96.0 + 64.0 * np.sin((self.y + phase) * (2 * np.pi / 60.0)), (self.height, self.width))
        blue = np.full((self.height, self.width), 110.0, np.float32)
        picture = np.stack([red, green, blue], axis=-1).astype(np.uint8)
        turn = index * (2 * np.pi / 64.0)
        centre_x = self.width * (0.5 + 0.3 * np.cos(turn))
        centre_y = self.height * (0.55 + 0.3 * np.sin(turn))
        disc = (self.x - centre_x) ** 2 + (self.y - centre_y) ** 2 < (self.height * 0.12) ** 2
        picture[disc] = (250, 230, 60)
        cell_width, cell_height = bit_cell(self.width, self.height)
        for bit in range(BITS):
            value = 255 if index >> (BITS - 1 - bit) & 1 else 0
            picture[:cell_height, bit * cell_width : (bit + 1) * cell_width] = value
        return picture


class PatternSource:
    """``frames`` pictures (0: endless) at ``fps``: numbered ones, or the ``scene``."""

    def __init__(self, width: int, height: int, frames: int, fps: float | None, look: str = "bits") -> None:
        self._rate = Fraction(fps or DEFAULT_FPS).limit_denominator(1001)
        self._frames = frames
        self._look, self._size, self._drawn = look, (width, height), (0, 0)
        self.time_base = 1 / (self._rate * 1000)
        self.audio: AudioTrack | None = None

    def read(self) -> Iterator[Picture | Sound]:
        """Picture after picture; each is drawn when it is asked for."""
        index, canvas = 0, self._canvas()
        while not self._frames or index < self._frames:
            if self._drawn != self._size:
                canvas = self._canvas()
            yield Picture(index * 1000, 1000, canvas.draw(index))
            index += 1

    def resize(self, width: int, height: int) -> None:
        """Draw at another size from the next picture on."""
        self._size = (width, height)

    def close(self) -> None:
        """Nothing is held."""

    def _canvas(self) -> Scene | _Canvas:
        self._drawn = width, height = self._size
        return Scene(width, height, float(self._rate)) if self._look == "scene" else _Canvas(width, height)
