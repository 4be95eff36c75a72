"""One H.264 encoder per stream, whose packets every live sink shares."""

from __future__ import annotations

import io
import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any

import av
import av.error
import numpy as np
from av.codec.context import Flags
from av.video.frame import PictureType
from av.video.reformatter import ColorPrimaries, ColorTrc

from services.egress.codec import YuvConverter, h264_options
from services.egress.sinks.port import OutFrame

log = logging.getLogger(__name__)

HARDWARE = ("h264_nvenc", "h264_qsv", "h264_vaapi", "h264_v4l2m2m", "h264_videotoolbox")
SOFTWARE = "libx264"
OPTIONS = {
    SOFTWARE: {"forced-idr": "1"},
    "h264_nvenc": {"forced-idr": "1", "delay": "0", "zerolatency": "1"},
    "h264_qsv": {"forced_idr": "1", "async_depth": "1"},
}
"""So that a frame which is to be a keyframe is one that a sink can begin with, and gives its packet at once."""


@dataclass(frozen=True, slots=True)
class EncodedFrame:
    """One access unit in Annex B; ``pts`` and ``duration`` (0: unknown) count ticks of ``time_base``."""

    data: bytes
    pts: int
    dts: int
    duration: int
    time_base: Fraction
    key: bool
    chunk: int


@lru_cache(maxsize=1)
def best_encoder() -> str:
    """The first hardware encoder that really works on this machine, else libx264. Opens devices: not for the event loop."""
    for name in HARDWARE:
        try:
            works = obeys(name)
        except (av.error.FFmpegError, ValueError, OSError):
            continue
        if works:
            log.info("H.264 is encoded by %s", name)
            return name
    return SOFTWARE


def obeys(name: str) -> bool:
    """Whether an encoder gives a packet for every frame, and a keyframe where one is asked for.

    Raises av.error.FFmpegError, ValueError, OSError where this machine has it not.
    """
    context: Any = av.CodecContext.create(name, "w")
    context.width, context.height, context.pix_fmt, context.time_base = 320, 192, "yuv420p", Fraction(1, 30)
    context.gop_size, context.max_b_frames, context.options = 48, 0, OPTIONS.get(name, {})
    packets: list[Any] = []
    for index, wanted in enumerate((PictureType.I, PictureType.NONE, PictureType.I)):
        picture = av.VideoFrame.from_ndarray(np.full((192, 320, 3), 40 * index, np.uint8), format="rgb24")
        frame: Any = picture.reformat(format="yuv420p")
        frame.pts, frame.time_base, frame.pict_type = index, Fraction(1, 30), wanted
        packets += context.encode(frame)
    packets += context.encode(None)
    return [bool(packet.is_keyframe) for packet in packets] == [True, False, True]


class SharedEncoder:
    """Frames in, packets out. Begun with the first frame; without reordering, so every frame gives its packet at once."""

    def __init__(self, width: int, height: int, rate: Fraction, encoder: str | Callable[[], str] = SOFTWARE) -> None:
        self.frames = 0
        self.size, self._rate = (width, height), rate
        self._choose = encoder if callable(encoder) else lambda: encoder
        self._encoder = ""  # until the first frame: choosing one may take a moment
        self._mother: Any = None
        self._context: Any = None
        self._time_base = Fraction(1, 90_000)
        self._yuv = YuvConverter()
        self._durations: deque[tuple[int, int, int]] = deque(maxlen=64)
        self.stream: Any = None  # a template for muxers

    @property
    def extradata(self) -> bytes:
        """The parameter sets."""
        return self._context.extradata or b""

    def encode(self, frame: OutFrame, key: bool) -> list[EncodedFrame]:
        """One frame; ``key``: as a keyframe. Raises av.error.FFmpegError."""
        if self._context is None:
            self._encoder = self._choose()
            self._context = self._open_any(frame.time_base)
        picture = self._yuv.convert(frame.pixels)
        picture.pts, picture.time_base = int(frame.pts * frame.time_base / self._time_base), self._time_base
        picture.pict_type = PictureType.I if key else PictureType.NONE
        self._durations.append((picture.pts, int(frame.duration * frame.time_base / self._time_base), frame.chunk))
        self.frames += 1
        packets: list[Any] = self._context.encode(picture)
        return [self._packet(packet) for packet in packets]

    def close(self) -> None:
        """Let the encoder go."""
        if self._mother is not None:
            self._context = self.stream = self._mother = None

    def _packet(self, packet: Any) -> EncodedFrame:
        duration, chunk = next(((d, c) for pts, d, c in self._durations if pts == packet.pts), (0, -1))
        return EncodedFrame(
            bytes(packet), packet.pts, packet.dts, duration, self._time_base, bool(packet.is_keyframe), chunk
        )

    def _open_any(self, time_base: Fraction) -> Any:
        """The encoder that was asked for; software where this machine has it not."""
        try:
            return self._open(time_base)
        except (av.error.FFmpegError, ValueError, OSError) as error:
            if self._encoder == SOFTWARE:
                raise
            log.warning("%s does not work here (%s): H.264 is encoded by %s", self._encoder, error, SOFTWARE)
            self._encoder = SOFTWARE
            return self._open(time_base)

    def _open(self, time_base: Fraction) -> Any:
        self._time_base = time_base
        width, height = self.size
        options = {
            **(h264_options(width, height) if self._encoder == SOFTWARE else {}),
            **OPTIONS.get(self._encoder, {}),
        }
        # The container is never written to: its stream is what muxers copy their parameters from.
        self._mother = av.open(io.BytesIO(), "w", format="matroska")
        stream: Any = self._mother.add_stream(self._encoder, rate=self._rate, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        context = stream.codec_context
        context.time_base = stream.time_base = time_base
        context.thread_count, context.gop_size, context.max_b_frames = 1, 48, 0
        context.color_range, context.colorspace = 1, 1
        context.color_primaries, context.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
        context.flags |= Flags.global_header
        context.open()
        self.stream = stream
        return context
