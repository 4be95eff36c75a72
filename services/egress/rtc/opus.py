"""A stream's sound as Opus: passed on where it is that already, made once for all viewers where it is not."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import av
import av.error

from services.egress.rtc.fanout import Encoded
from shared.contracts.events import AudioCaptured
from shared.media.audio_header import AudioTemplate
from shared.media.errors import MediaError

log = logging.getLogger(__name__)

OPUS_RATE = 48_000
FRAME = 960  # 20 ms
BIT_RATE = 96_000


class OpusTrack:
    """Parts of one sound track in, Opus packets out. What cannot be decoded is silence."""

    def __init__(self, part: AudioCaptured) -> None:
        self._passes = part.codec == "opus"
        self._base = Fraction(*part.time_base)
        if self._passes:
            return
        self._template = AudioTemplate(part.header)
        context = self._template.stream.codec_context
        self._decoder: Any = av.CodecContext.create(context.name, "r")
        self._decoder.extradata = context.extradata
        self._decoder.sample_rate = part.sample_rate
        self._decoder.layout = part.layout
        self._resampler = _resampler()
        self._encoder: Any = av.CodecContext.create("libopus", "w")
        self._encoder.bit_rate, self._encoder.format, self._encoder.layout = BIT_RATE, "s16", "stereo"
        self._encoder.sample_rate, self._encoder.time_base = OPUS_RATE, Fraction(1, OPUS_RATE)

    def feed(self, part: AudioCaptured) -> Iterator[tuple[Fraction, Encoded]]:
        """Packets with the second they start at."""
        for pts, dts, _, data in part.packets:
            if self._passes:
                start = pts * self._base
                yield start, Encoded(data, round(start * OPUS_RATE))
                continue
            packet: Any = av.Packet(data)
            packet.pts, packet.dts, packet.time_base = pts, dts, self._base
            yield from self._transcoded(packet)

    def close(self) -> None:
        """Let the header go."""
        if not self._passes:
            self._template.close()

    def _transcoded(self, packet: Any) -> Iterator[tuple[Fraction, Encoded]]:
        try:
            frames = self._decoder.decode(packet)
        except av.error.FFmpegError:
            return
        for frame in frames:
            for even in self._even(frame):
                for made in self._encoder.encode(even):
                    yield Fraction(made.pts, OPUS_RATE), Encoded(bytes(made), made.pts)

    def _even(self, frame: Any) -> list[Any]:
        """As frames of 20 ms in stereo. One of another layout or rate, or after a gap, begins anew."""
        try:
            return self._resampler.resample(frame)
        except ValueError:
            self._resampler = _resampler()
            return self._resampler.resample(frame)


def _resampler() -> Any:
    return av.AudioResampler(format="s16", layout="stereo", rate=OPUS_RATE, frame_size=FRAME)


def track_of(part: AudioCaptured) -> OpusTrack | None:
    """The track that a part belongs to; None for one that cannot be used."""
    try:
        return OpusTrack(part)
    except (MediaError, av.error.FFmpegError, ValueError) as error:
        log.warning("stream %s: viewers get no sound: %s", part.stream, error)
        return None
