"""An MP4 file: H.264 with the source's own timestamps, the source's sound untouched."""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import av.error

from services.egress.codec import H264Track
from services.egress.fitted import fitted
from services.egress.sinks.port import OutFrame, SinkError
from shared.contracts.events import AudioCaptured
from shared.media.audio_header import AudioTemplate
from shared.media.errors import MediaError, one_line
from shared.media.salvage import discard, finalise_part, keep_foreign, part_path, set_aside

log = logging.getLogger(__name__)

# Every fragment is complete in itself: after a kill at most this much of the recording is missing.
FRAGMENT_US = 500_000
PART_OPTIONS = {
    "movflags": "+frag_keyframe+empty_moov+delay_moov+default_base_moof",
    "frag_duration": str(FRAGMENT_US),
    "flush_packets": "1",
    "max_interleave_delta": "1000000",
}
# How long the first frames wait for a sound track that was announced and has not come yet.
AUDIO_WAIT_S = 2.0
MAX_HELD = 64


class Mp4Sink:
    """Records to ``<name>.part.mp4`` and makes the final file of it at the end.

    ``resume``: a predecessor was recording this stream; its piece is kept and joined. Any other recording found under
    the part's name is kept under a new one. Raises SinkError when the destination cannot be written.
    """

    def __init__(self, final: Path, width: int, height: int, rate: Fraction, *, resume: bool = False) -> None:
        self.final = final
        self._part = part_path(final)
        self._width, self._height, self._rate = width, height, rate
        self._container: Any = None
        self._track: H264Track | None = None
        self._audio_stream: Any = None
        self._template: AudioTemplate | None = None
        self._expected: bool | None = None
        self._held: deque[OutFrame | AudioCaptured] = deque()
        self._held_since = 0.0
        self._last_pts: int | None = None
        self._last_audio_dts: int | None = None
        self._finished: str | None = None
        self._prepare(resume)

    def expect_audio(self, expected: bool) -> None:
        """Whether the source has sound."""
        self._expected = expected

    def write(self, frame: OutFrame) -> None:
        """One frame; one that does not follow the last in time is left out (the file could not hold it)."""
        if self._container is None:
            self._hold(frame)
            return
        self._write(frame)

    def audio(self, part: AudioCaptured) -> None:
        """Packets of the sound track."""
        if self._container is None and self._template is None and part.header:
            self._expected = True
            try:
                self._template = AudioTemplate(part.header)
            except MediaError as error:
                log.warning("%s is recorded without sound: %s", self.final.name, error)
                self._expected = False
        if self._container is None:
            self._held.append(part)
            return
        self._mux_audio(part)

    def still(self, until_s: Fraction) -> None:
        """A file has its sound as it comes."""

    def finish(self) -> str:
        """Complete the part and make the final file of it. Without a single frame there is no file."""
        if self._finished is not None:
            return self._finished
        self._finished = ""
        try:
            if self._container is None and any(isinstance(item, OutFrame) for item in self._held):
                self._open()
            if self._container is not None:
                assert self._track is not None
                self._track.flush()
                self._container.close()
                self._container = None
            if not self._part.exists() and not set_aside_exists(self._part):
                return ""
            if self._part.exists() and self._part.stat().st_size == 0:
                self._part.unlink()
            pictures = finalise_part(self._part, self.final)
        except MediaError as error:
            if "no picture" in str(error):
                discard(self._part)
                return ""
            raise SinkError(str(error)) from None
        except (OSError, av.error.FFmpegError) as error:
            raise SinkError(self._broken(error)) from None
        finally:
            if self._template is not None:
                self._template.close()
        self._finished = f"{pictures} frames in {self.final}"
        return self._finished

    # --- opening -----------------------------------------------------------------------------------------------------

    def _prepare(self, resume: bool) -> None:
        folder = self.final.parent
        if self.final.is_dir():
            raise SinkError(f"{self.final}: is a folder; name a file in it")
        if not folder.is_dir():
            raise SinkError(f"{self.final}: its folder does not exist; create {folder} first")
        try:
            if resume:
                set_aside(self._part)
            else:
                for kept in keep_foreign(self._part):
                    log.warning("%s was there already; it is kept, in %s", self._part, kept.name)
            # An empty part claims the name, and shows now that the folder can be written.
            os.close(os.open(self._part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
        except OSError as error:
            reason = error.strerror or one_line(error)
            raise SinkError(
                f"{self.final}: cannot be written ({reason}); choose a folder egress may write to"
            ) from None

    def _hold(self, frame: OutFrame) -> None:
        if not self._held_since:
            self._held_since = time.monotonic()
        self._held.append(frame)
        ready = self._expected is False or self._template is not None
        too_long = time.monotonic() - self._held_since > AUDIO_WAIT_S or len(self._held) > MAX_HELD
        if ready or too_long:
            self._open()

    def _open(self) -> None:
        first = next(item for item in self._held if isinstance(item, OutFrame))
        try:
            self._container = av.open(str(self._part), mode="w", format="mp4", options=PART_OPTIONS)
            self._track = H264Track(self._container, self._width, self._height, first.time_base, self._rate)
            if self._template is not None:
                self._audio_stream = self._container.add_stream_from_template(self._template.stream)
        except (av.error.FFmpegError, ValueError, OSError) as error:
            raise SinkError(self._broken(error)) from None
        held, self._held = self._held, deque()
        for item in held:
            if isinstance(item, OutFrame):
                self._write(item)
            else:
                self._mux_audio(item)

    # --- writing -----------------------------------------------------------------------------------------------------

    def _write(self, frame: OutFrame) -> None:
        assert self._track is not None
        if self._last_pts is not None and frame.pts <= self._last_pts:
            return
        self._last_pts = frame.pts
        try:
            self._track.write(replace(frame, pixels=fitted(frame.pixels, self._width, self._height)))
        except (OSError, av.error.FFmpegError) as error:
            raise SinkError(self._broken(error)) from None

    def _mux_audio(self, part: AudioCaptured) -> None:
        if self._audio_stream is None:
            return
        time_base = Fraction(*part.time_base)
        try:
            for pts, dts, duration, data in part.packets:
                if self._last_audio_dts is not None and dts <= self._last_audio_dts:
                    continue
                self._last_audio_dts = dts
                packet: Any = av.Packet(data)
                packet.pts, packet.dts, packet.duration = pts, dts, duration
                packet.time_base = time_base
                packet.is_keyframe = True
                packet.stream = self._audio_stream
                self._container.mux(packet)
        except (OSError, av.error.FFmpegError) as error:
            raise SinkError(self._broken(error)) from None

    def _broken(self, error: BaseException) -> str:
        return f"{self.final}: cannot be written on ({one_line(error)}); free disk space, or choose another folder"


def set_aside_exists(part: Path) -> bool:
    """Whether earlier pieces of this recording wait."""
    return part.with_name(f"{part.stem}-0{part.suffix}").exists()
