"""A publisher's WebRTC as a source: encoded frames from the inbox, decoded and fitted in the reader's thread."""

from __future__ import annotations

import time
from collections.abc import Iterator
from fractions import Fraction

import numpy as np

from services.ingest.fit import Fitter
from services.ingest.sources.port import AudioTrack, Picture, Sound, SourceError
from shared.contracts.commands import Fit
from shared.media.audio_header import make_encoded_header
from shared.rtc.decoding import FrameDecoder
from shared.rtc.inbox import EncodedFrame, EncodedSound, Inbox, Over

VIDEO_BASE, AUDIO_BASE = Fraction(1, 90_000), Fraction(1, 48_000)
OPUS_TICKS = 960  # 20 ms
REANCHOR_TICKS = 4800  # sound that is 100 ms off its clock is put right
# RFC 7845: version, channels, pre-skip, input rate, gain, mapping.
OPUS_HEAD = b"OpusHead" + bytes((1, 2)) + (312).to_bytes(2, "little") + (48_000).to_bytes(4, "little") + bytes(3)


def opus_track() -> AudioTrack:
    """What a browser sends: Opus, 48 kHz, stereo."""
    silent = np.zeros((2, OPUS_TICKS), np.float32)
    header = make_encoded_header("libopus", 48_000, "stereo", 64_000, silent)
    return AudioTrack("opus", 48_000, "stereo", AUDIO_BASE, OPUS_HEAD, header)


class WhipSource:
    """Frames as they come, at most ``fps`` a second (None: all). Timestamps count from when the source was opened.

    A picture that does not decode is left out, and a key frame asked for.
    """

    def __init__(self, inbox: Inbox, width: int, height: int, fit: Fit, fps: float | None, with_audio: bool) -> None:
        self._inbox = inbox
        self._fitter = Fitter(width, height, fit)
        self._with_audio = with_audio
        self._interval_ns = int(1e9 / fps) if fps else 0
        self._opened_ns = time.time_ns()
        self._decoder = FrameDecoder(inbox)
        self._last_pts = -1
        self._due_ns = 0
        self._sound_offset: int | None = None
        self._sound_session = ""
        self._track: AudioTrack | None = None
        self.time_base = VIDEO_BASE

    @property
    def audio(self) -> AudioTrack | None:
        """The sound track, once a publisher has offered one."""
        if self._track is None and self._with_audio and self._inbox.with_sound:
            self._track = opus_track()
        return self._track

    def read(self) -> Iterator[Picture | Sound]:
        """Until the inbox ends. Raises SourceError when nobody came (back)."""
        while True:
            item = self._inbox.get()
            if isinstance(item, Over):
                if item.error is not None:
                    raise SourceError(item.error)
                return
            if isinstance(item, EncodedSound):
                if self._with_audio:
                    yield self._sound(item)
            else:
                yield from self._pictures(item)

    def resize(self, width: int, height: int) -> None:
        """Fit to another size from the next picture on."""
        self._fitter.resize(width, height)

    def close(self) -> None:
        """Take nothing more."""
        self._inbox.end()

    def _pictures(self, item: EncodedFrame) -> Iterator[Picture]:
        frame = self._decoder.decode(item)
        if frame is None or (self._interval_ns and not self._is_due(item.captured_ns)):
            return
        pts = max(self._last_pts + 1, (item.captured_ns - self._opened_ns) * 9 // 100_000)
        self._last_pts = pts
        yield Picture(pts, 0, self._fitter.fit(frame, None), item.captured_ns)

    def _is_due(self, captured_ns: int) -> bool:
        """Thins to ``fps``: half an interval early will do, so that an even source stays even."""
        if captured_ns < self._due_ns - self._interval_ns // 4:
            return False
        self._due_ns = max(self._due_ns + self._interval_ns, captured_ns + self._interval_ns // 2)
        return True

    def _sound(self, item: EncodedSound) -> Sound:
        clock = (item.captured_ns - self._opened_ns) * 48 // 1_000_000
        new = item.session != self._sound_session or self._sound_offset is None
        if new or abs(item.timestamp + (self._sound_offset or 0) - clock) > REANCHOR_TICKS:
            self._sound_session, self._sound_offset = item.session, clock - item.timestamp
        pts = item.timestamp + (self._sound_offset or 0)
        return Sound(pts, pts, OPUS_TICKS, item.data)
