"""Sound of a file: passed on untouched where MP4 can hold its codec, else transcoded to AAC."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import av
import av.error
import numpy as np
from av.codec.context import Flags

from services.ingest.sources.port import AudioTrack, Sound
from shared.media.audio_header import make_encoded_header, make_header
from shared.media.errors import MediaError

log = logging.getLogger(__name__)

PASSED = frozenset({"aac", "mp3", "mp3float", "ac3", "eac3", "alac", "flac", "opus"})
NEEDS_EXTRADATA = frozenset({"alac", "flac", "opus"})
AAC_RATES = (96000, 88200, 64000, 48000, 44100, 32000, 24000, 22050, 16000, 12000, 11025, 8000)
AAC_BIT_RATE = 160_000
MAX_PACKET_BYTES = 450_000


class PassedAudio:
    """Packets go through as they are; the AAC of broadcast streams only loses its per-packet (ADTS) headers."""

    def __init__(self, stream: Any, first: Any) -> None:
        context = stream.codec_context
        self._strip = context.name == "aac" and is_adts(bytes(first))
        data = bytes(first)
        self.track = AudioTrack(
            codec={"mp3float": "mp3"}.get(context.name, context.name),
            sample_rate=context.sample_rate,
            layout=context.layout.name,
            time_base=Fraction(stream.time_base),
            extradata=bytes(context.extradata) if context.extradata else None,
            header=make_header(stream, data, first.duration or 0),
        )

    def feed(self, packet: Any) -> Iterator[Sound]:
        """One packet in, one out."""
        data = bytes(packet)
        if not data or len(data) > MAX_PACKET_BYTES or packet.dts is None:
            return
        if self._strip:
            data = without_adts(data)
        pts = packet.dts if packet.pts is None else packet.pts
        yield Sound(pts, packet.dts, packet.duration or 0, data)

    def flush(self) -> Iterator[Sound]:
        """Nothing is held back."""
        return iter(())


class TranscodedAudio:
    """Decode, resample where AAC needs it, encode."""

    def __init__(self, stream: Any) -> None:
        context = stream.codec_context
        channels = min(2, context.layout.nb_channels)
        layout = "mono" if channels == 1 else "stereo"
        rate = context.sample_rate if context.sample_rate in AAC_RATES else 48000
        self._stream = stream
        self._encoder: Any = av.CodecContext.create("aac", "w")
        self._encoder.sample_rate = rate
        self._encoder.layout = layout
        self._encoder.format = "fltp"
        self._encoder.bit_rate = AAC_BIT_RATE
        self._encoder.time_base = Fraction(1, rate)
        # Parameters go into the container, not into every packet.
        self._encoder.flags |= Flags.global_header
        self._encoder.open()
        self._resampler = av.AudioResampler(format="fltp", layout=layout, rate=rate, frame_size=1024)
        self._next_pts: int | None = None
        silent = np.zeros((channels, 1024), np.float32)
        self.track = AudioTrack(
            codec="aac",
            sample_rate=rate,
            layout=layout,
            time_base=Fraction(1, rate),
            extradata=bytes(self._encoder.extradata) if self._encoder.extradata else None,
            header=make_encoded_header("aac", rate, layout, AAC_BIT_RATE, silent),
        )

    def feed(self, packet: Any) -> Iterator[Sound]:
        """Packets of AAC for what the packet decodes to. A packet that does not decode is silence."""
        try:
            frames = self._stream.codec_context.decode(packet)
        except av.error.FFmpegError:
            return
        for frame in frames:
            if frame.pts is None and self._next_pts is None:
                frame.pts = 0
            for even in self._resampler.resample(frame):
                yield from self._encode(even)

    def flush(self) -> Iterator[Sound]:
        """The end of the sound."""
        for even in self._resampler.resample(None):
            yield from self._encode(even)
        yield from self._packets(self._encoder.encode(None))

    def _encode(self, frame: Any) -> Iterator[Sound]:
        self._next_pts = frame.pts
        yield from self._packets(self._encoder.encode(frame))

    def _packets(self, packets: list[Any]) -> Iterator[Sound]:
        for packet in packets:
            yield Sound(packet.pts, packet.dts, packet.duration or 1024, bytes(packet))


def open_audio(path: str, index: int) -> tuple[PassedAudio | TranscodedAudio, Any] | None:
    """The sound handling for audio stream ``index`` of ``path``, judged by its first packet; None when it has none.

    Returns the handler and the container it was described from, which must stay open as long as the handler is used.
    """
    container: Any = av.open(path, mode="r")
    keep = False
    try:
        stream = container.streams[index]
        context = stream.codec_context
        if context is None or not context.sample_rate:
            return None
        first = next((packet for packet in container.demux(stream) if packet.size), None)
        if first is None:
            return None
        described = _described(stream, first)
        keep = True
        return described, container
    except (av.error.FFmpegError, MediaError, ValueError) as error:
        log.warning("the sound of %s cannot be used: %s", path, error)
        return None
    finally:
        if not keep:
            container.close()


def choose_audio(stream: Any, first: Any) -> PassedAudio | TranscodedAudio | None:
    """The sound handling for a stream whose first packet has been read already; None when it cannot be used."""
    try:
        return _described(stream, first) if stream.codec_context is not None else None
    except (av.error.FFmpegError, MediaError, ValueError) as error:
        log.warning("the sound of a source cannot be used: %s", error)
        return None


def _described(stream: Any, first: Any) -> PassedAudio | TranscodedAudio:
    context = stream.codec_context
    if context.name in PASSED and (context.extradata or context.name not in NEEDS_EXTRADATA):
        try:
            return PassedAudio(stream, first)
        except MediaError as error:
            log.info("the sound is transcoded: %s", error)
    return TranscodedAudio(stream)


def is_adts(data: bytes) -> bool:
    """Whether an AAC packet starts with its own ADTS header."""
    return len(data) > 7 and data[0] == 0xFF and data[1] & 0xF6 == 0xF0


def without_adts(data: bytes) -> bytes:
    """The bare AAC frame: an ADTS header has 7 bytes, or 9 with a checksum."""
    if not is_adts(data):
        return data
    return data[7 if data[1] & 1 else 9 :]
