"""A video file, decoded with PyAV in the reader's thread."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import av.error

from services.ingest.fit import Fitter
from services.ingest.sources.audio import PassedAudio, TranscodedAudio, open_audio
from services.ingest.sources.port import AudioTrack, Picture, Sound, SourceError
from services.ingest.timeline import AsIs, ConstantRate, Monotonic, Timed
from shared.contracts.commands import Fit
from shared.media.errors import MediaError, one_line
from shared.media.probe import picture_stream, probe, why_unreadable

log = logging.getLogger(__name__)

LARGE_PIXELS = 1_200_000
# A first timestamp outside these seconds is a clock reading, not a start: the whole file is shifted to 0.
MAX_START_S = 10


class FileSource:
    """One file. Opening raises SourceError with one line that names the fix."""

    def __init__(self, path: Path, width: int, height: int, fit: Fit, fps: float | None, with_audio: bool) -> None:
        self._path = path
        try:
            probe(path)
            self._container: Any = av.open(str(path), mode="r")
        except MediaError as error:
            raise SourceError(str(error)) from None
        except av.error.FFmpegError as error:
            raise SourceError(why_unreadable(path, error)) from None
        self._video: Any = picture_stream(self._container)
        pixels = self._video.codec_context.width * self._video.codec_context.height
        self._video.codec_context.thread_count = 2 if pixels > LARGE_PIXELS else 1
        self._fitter = Fitter(width, height, fit)
        self._base = Fraction(self._video.time_base)
        self._line: AsIs[Any] | ConstantRate[Any] = AsIs(self._base) if fps is None else ConstantRate(self._base, fps)
        self._stamps = Monotonic()
        self._sound: PassedAudio | TranscodedAudio | None = None
        self._audio_stream: Any = None
        self._described: Any = None
        if with_audio and self._container.streams.audio:
            self._open_audio()
        self._shift_s = self._start_shift()
        self._last_duration = self._usual_duration()
        self._read_to = Fraction(0)
        self._sound_to: int | None = None
        self._cut = ""

    @property
    def time_base(self) -> Fraction:
        """Seconds per tick of the picture timestamps."""
        return self._line.time_base

    @property
    def audio(self) -> AudioTrack | None:
        """The sound track, if it can be used."""
        return self._sound.track if self._sound is not None else None

    def resize(self, width: int, height: int) -> None:
        """Fit to another size from the next picture on."""
        self._fitter.resize(width, height)

    def close(self) -> None:
        """Close the file."""
        self._container.close()
        if self._described is not None:
            self._described.close()

    def read(self) -> Iterator[Picture | Sound]:
        """Pictures and sound in file order. Raises SourceError at the end when not everything could be read."""
        undecodable = ""
        for packet in self._packets():
            if self._audio_stream is not None and packet.stream_index == self._audio_stream.index:
                yield from self._sounds(packet)
                continue
            try:
                for frame in packet.decode():
                    for timed in self._line.feed(self._timed(frame)):
                        yield self._picture(timed)
            except av.error.FFmpegError as error:
                undecodable = (
                    undecodable or f"some of it cannot be decoded, first after {self._at()} ({one_line(error)})"
                )
        for timed in self._line.flush():
            yield self._picture(timed)
        if self._sound is not None:
            yield from self._shifted(self._sound.flush())
        problem = self._cut or undecodable
        if problem:
            raise SourceError(f"{self._path.name}: {problem}; copy or record it again")

    def _packets(self) -> Iterator[Any]:
        """Packets, then what empties the decoder. ``_cut`` says afterwards whether the file ended too early."""
        streams = [self._video] if self._audio_stream is None else [self._video, self._audio_stream]
        pictures, flushed = 0, False
        try:
            for packet in self._container.demux(*streams):
                if packet.stream_index != self._video.index:
                    if packet.size:
                        yield packet
                    continue
                pictures += packet.size > 0
                flushed = flushed or packet.size == 0
                yield packet
        except av.error.FFmpegError as error:
            self._cut = f"breaks off after {self._at()} ({one_line(error)})"
        if not flushed:
            # Frames that the decoder still holds are good ones.
            yield _Flush(self._video)
        # An MP4's index knows how many pictures there are; a reader that meets the end of the file just stops.
        promised = self._video.frames
        if not self._cut and promised and pictures < promised - 1:
            self._cut = f"breaks off after {self._at()}: {pictures} of its {promised} pictures are there"
        elif not self._cut and self._seconds_missing() > max(1.0, 0.05 * self._promised_s):
            self._cut = f"breaks off after {self._at()}, although it should last {self._promised_s:.1f} s"

    def _seconds_missing(self) -> float:
        """What a Matroska header promises beyond what was read; other formats only guess their length."""
        if "matroska" not in self._container.format.name or not self._container.duration:
            return 0.0
        read = float(self._read_to - self._shift_s)
        if self._sound is not None and self._sound_to is not None:
            read = max(read, float(self._sound_to * self._sound.track.time_base))
        return self._promised_s - read

    @property
    def _promised_s(self) -> float:
        return (self._container.duration or 0) / av.time_base

    def _at(self) -> str:
        """How far the source has been read."""
        return f"{float(self._read_to):.1f} s"

    def _timed(self, frame: Any) -> Timed[Any]:
        duration = frame.duration or 0
        shift = round(self._shift_s / self._base)
        pts = self._stamps.repair(None if frame.pts is None else frame.pts + shift, duration)
        self._last_duration = duration or self._last_duration
        self._read_to = (pts + self._last_duration) * self._base
        return Timed(pts, duration or self._last_duration, _Lazy(frame))

    def _picture(self, timed: Timed[Any]) -> Picture:
        return Picture(timed.pts, timed.duration, timed.pixels.fitted(self._fitter, self._video.sample_aspect_ratio))

    def _sounds(self, packet: Any) -> Iterator[Sound]:
        assert self._sound is not None
        for sound in self._shifted(self._sound.feed(packet)):
            self._sound_to = sound.pts + sound.duration
            yield sound

    def _shifted(self, sounds: Iterator[Sound]) -> Iterator[Sound]:
        assert self._sound is not None
        shift = round(self._shift_s / self._sound.track.time_base)
        for sound in sounds:
            yield Sound(sound.pts + shift, sound.dts + shift, sound.duration, sound.data)

    def _open_audio(self) -> None:
        stream = next((s for s in self._container.streams.audio if s.codec_context is not None), None)
        if stream is None:
            return
        opened = open_audio(str(self._path), stream.index)
        if opened is not None:
            self._sound, self._described = opened
            self._audio_stream = stream

    def _start_shift(self) -> Fraction:
        start = self._video.start_time
        first = Fraction(start) * self._base if start is not None else Fraction(0)
        return -first if first < 0 or first > MAX_START_S else Fraction(0)

    def _usual_duration(self) -> int:
        rate = self._video.average_rate or self._video.guessed_rate
        return max(1, round(1 / (Fraction(rate) * self._base))) if rate else 1


class _Flush:
    """Stands for the end of the packets: gives what the decoder still holds."""

    def __init__(self, stream: Any) -> None:
        self.stream_index = stream.index
        self._stream = stream

    def decode(self) -> list[Any]:
        """The last frames."""
        return self._stream.codec_context.decode(None)


class _Lazy:
    """A decoded frame that is fitted when it is first used: resampling may leave it out, or use it twice."""

    __slots__ = ("_frame", "_pixels")

    def __init__(self, frame: Any) -> None:
        self._frame = frame
        self._pixels: Any = None

    def fitted(self, fitter: Fitter, aspect: Fraction | None) -> Any:
        """uint8 [height, width, 3]."""
        if self._pixels is None:
            self._pixels = fitter.fit(self._frame, aspect)
            self._frame = None
        return self._pixels
