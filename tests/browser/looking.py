"""What is on the screen, as numbers."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from playwright.sync_api import Page

_GRAB = """(place) => {
  const player = document.querySelector(place + " .player");
  if (!player) return null;
  const video = player.querySelector("video");
  const canvas = player.querySelector("canvas");
  const image = !video.hidden && video.videoWidth ? video : canvas;
  const small = document.createElement("canvas");
  small.width = 48; small.height = 30;
  const context = small.getContext("2d");
  context.drawImage(image, 0, 0, 48, 30);
  return [...context.getImageData(0, 0, 48, 30).data];
}"""


@dataclass(frozen=True, slots=True)
class Look:
    """A picture of 48×30 as float [30, 48, 3] in [0, 1]."""

    pixels: np.ndarray

    @property
    def colourful(self) -> float:
        """Mean distance of the strongest from the weakest channel."""
        return float((self.pixels.max(axis=-1) - self.pixels.min(axis=-1)).mean())

    @property
    def bright(self) -> float:
        return float(self.pixels.mean())

    def differs(self, other: Look) -> float:
        """Mean absolute difference."""
        return float(np.abs(self.pixels - other.pixels).mean())


def look(page: Page, place: str = "#picture") -> Look:
    """The player in ``place``, now."""
    data = page.evaluate(_GRAB, place)
    assert data is not None, f"there is no picture in {place}"
    return Look(np.asarray(data, dtype=np.float32).reshape(30, 48, 4)[..., :3] / 255)


def first_picture_ms(page: Page, timeout_s: float) -> float:
    """Milliseconds from the press to the first restyled picture, as the page measured them."""
    page.wait_for_selector("#result[data-first-picture]", timeout=timeout_s * 1000, state="attached")
    return float(page.get_attribute("#result", "data-first-picture") or "nan")


def moves(page: Page, place: str = "#picture", within_s: float = 15.0) -> bool:
    """Whether the picture changes."""
    begin = look(page, place)
    until = time.monotonic() + within_s
    while time.monotonic() < until:
        page.wait_for_timeout(150)
        if look(page, place).differs(begin) > 0.002:
            return True
    return False


def until_look(page: Page, wanted: Callable[[Look], bool], within_s: float = 25.0) -> Look:
    """The first look at the result that ``wanted`` likes, or the last one."""
    until = time.monotonic() + within_s
    while True:
        now = look(page)
        if wanted(now) or time.monotonic() > until:
            return now
        page.wait_for_timeout(200)
