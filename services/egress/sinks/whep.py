"""Viewers by WebRTC as one more sink: frames are encoded once, and only while somebody looks."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from fractions import Fraction

from services.egress.rtc.fanout import Encoded, Fanout
from services.egress.rtc.live_h264 import VIDEO_RATE, LiveH264
from services.egress.rtc.live_vp8 import LiveVp8
from services.egress.rtc.opus import OpusTrack, track_of
from services.egress.sinks.port import OutFrame
from shared.contracts.events import AudioCaptured

log = logging.getLogger(__name__)

MAX_SOUND = 512  # parts that wait for their picture


class WhepSink:
    """Runs in the sink thread; packets are handed to the loop, where ``fanout`` lives.

    Sound comes as soon as it is captured, the picture when it has been made: sound waits for the picture of its time, and
    is made Opus then. An encoder that breaks costs the viewers their picture or their sound, and the stream nothing.
    """

    def __init__(
        self, width: int, height: int, fanout: Fanout, codec: type[LiveH264] | type[LiveVp8] = LiveH264
    ) -> None:
        self._size, self._codec = (width, height), codec
        self.fanout = fanout
        self._loop = asyncio.get_running_loop()
        self._encoder: LiveH264 | LiveVp8 | None = None
        self._last_pts: int | None = None
        self._track: OpusTrack | None = None
        self._no_sound = False
        self._parts: deque[AudioCaptured] = deque(maxlen=MAX_SOUND)
        self._sound: deque[tuple[Fraction, Encoded]] = deque()  # of the part whose time it is
        self._broken = False
        self.viewers = 0  # set on the loop

    def expect_audio(self, expected: bool) -> None:
        """The first part tells."""

    def write(self, frame: OutFrame) -> None:
        """Encode and hand out, if there is somebody."""
        shown_s = frame.pts * frame.time_base
        if not self.viewers or self._broken:
            self._encoder = None  # what it refers to is not seen by whoever comes next
            self.still(shown_s)
            return
        try:
            self._encode(frame, round(shown_s * VIDEO_RATE))
        except Exception:
            log.exception("viewers get no picture any more")
            self._broken = True
        self._release(shown_s, send=True)

    def audio(self, part: AudioCaptured) -> None:
        """Keep it for its picture."""
        if part.packets:
            self._parts.append(part)

    def still(self, until_s: Fraction) -> None:
        """The sound up to there."""
        self._release(until_s, send=self.viewers > 0)
        if not self.viewers:
            self._end_track()  # whoever comes next hears no rest of it

    def finish(self) -> str:
        """Nothing is kept."""
        self._end_track()
        return ""

    def _encode(self, frame: OutFrame, pts: int) -> None:
        size = frame.pixels.shape[1], frame.pixels.shape[0]
        if size != self._size:
            self._size, self._encoder = size, None
        if self._encoder is None:
            self._encoder, self._last_pts = self._codec(*self._size), None
        if self._last_pts is not None and pts <= self._last_pts:
            return
        self._last_pts = pts
        key = self.fanout.takes_key(time.monotonic_ns())
        for packet in self._encoder.encode(frame, pts, key):
            self._hand(self.fanout.video, packet)

    def _release(self, until_s: Fraction, *, send: bool) -> None:
        while self._parts and _begins(self._parts[0]) <= until_s:
            part = self._parts.popleft()
            if send and not self._no_sound:
                self._sound.extend(self._encoded(part))
        while self._sound and self._sound[0][0] <= until_s:
            _, packet = self._sound.popleft()
            if send:
                self._hand(self.fanout.audio, packet)

    def _encoded(self, part: AudioCaptured) -> list[tuple[Fraction, Encoded]]:
        try:
            self._track = self._track or track_of(part)
            self._no_sound = self._track is None
            return list(self._track.feed(part)) if self._track is not None else []
        except Exception:
            log.exception("viewers get no sound any more")
            self._no_sound = True
            return []

    def _end_track(self) -> None:
        if self._track is not None:
            self._track.close()
            self._track = None
        self._sound.clear()

    def _hand(self, take: Callable[[Encoded], None], packet: Encoded) -> None:
        try:
            self._loop.call_soon_threadsafe(take, packet)
        except RuntimeError:  # the loop is closed
            return


def _begins(part: AudioCaptured) -> Fraction:
    """The second at which a part with packets begins."""
    return part.packets[0][0] * Fraction(*part.time_base)
