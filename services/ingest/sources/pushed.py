"""Frames that a platform (over NATS) or a browser (over the gateway's WebSocket) pushes, one message each."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import av
import av.error
import numpy as np

from services.ingest.fit import Fitter
from services.ingest.heard import Heard
from services.ingest.links import Links
from services.ingest.sources.port import AudioTrack, Picture, SourceError
from shared.contracts.commands import Fit
from shared.contracts.sources import PushedFrame
from shared.media.jpeg import decode_jpeg

log = logging.getLogger(__name__)

LOOK_S = 0.25
MAX_AGE_NS = 10_000_000_000  # a capture time further off than this is another clock's


class PushedSource:
    """Pictures as they come, at most ``fps`` a second (None: all).

    One that cannot be read or fitted is counted and left out.
    """

    def __init__(
        self, width: int, height: int, fit: Fit, fps: float | None, idle_s: float, links: Links, heard: Heard
    ) -> None:
        self._fitter, self._idle_s, self._links, self._heard = Fitter(width, height, fit), idle_s, links, heard
        self._interval_ns = int(1e9 / fps) if fps else 0
        self._due_ns, self._last_pts, self._zero_ns = 0, -1, time.time_ns()
        self.time_base = Fraction(1, 90_000)

    @property
    def audio(self) -> AudioTrack | None:
        """Frames have no sound."""
        return None

    def read(self) -> Iterator[Picture]:
        """Until the last one, or nothing has come for ``idle_s``. Raises SourceError when none ever came."""
        since, came = time.monotonic(), 0
        while not self._links.stopped:
            pushed = self._heard.pushed(LOOK_S)
            if pushed is None:
                if self._idle_s and time.monotonic() - since > self._idle_s:
                    if not came:
                        raise SourceError(f"no frame was pushed within {self._idle_s:g} s")
                    return
                continue
            since = time.monotonic()
            if pushed.data and (picture := self._picture(pushed)) is not None:
                came += 1
                yield picture
            if pushed.last:
                return

    def resize(self, width: int, height: int) -> None:
        """Fit to another size from the next picture on."""
        self._fitter.resize(width, height)

    def close(self) -> None:
        """There is nothing to close."""

    def _picture(self, pushed: PushedFrame) -> Picture | None:
        now = time.time_ns()
        captured = pushed.captured_ns if abs(now - pushed.captured_ns) < MAX_AGE_NS else now
        captured = min(captured, now)
        if self._interval_ns:
            if captured < self._due_ns - self._interval_ns // 4:
                return None
            self._due_ns = max(self._due_ns + self._interval_ns, captured + self._interval_ns // 2)
        try:
            pixels = self._fitter.fit(_frame_of(pushed), None)
        except (av.error.FFmpegError, ValueError) as error:
            self._heard.count("pushed_unreadable")
            log.debug("a pushed frame cannot be read: %s", error)
            return None
        self._last_pts = max(self._last_pts + 1, (captured - self._zero_ns) * 9 // 100_000)
        return Picture(self._last_pts, 0, pixels, captured)


def _frame_of(pushed: PushedFrame) -> Any:
    if pushed.format == "jpeg":
        return decode_jpeg(pushed.data)
    shape = (pushed.height, pushed.width, 3)
    if not pushed.width or len(pushed.data) != pushed.width * pushed.height * 3:
        raise ValueError(f"{len(pushed.data)} bytes are no picture of {pushed.width}×{pushed.height}")
    return av.VideoFrame.from_ndarray(np.frombuffer(pushed.data, np.uint8).reshape(shape), format="rgb24")
