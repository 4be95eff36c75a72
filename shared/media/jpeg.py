"""JPEG pictures by FFmpeg's codec."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import av
import numpy as np
from av.video.reformatter import VideoReformatter


class JpegEncoder:
    """Pictures of any size; ``quality`` 1…100. ``pictures`` counts what was encoded."""

    def __init__(self, quality: int = 80) -> None:
        self._scale = max(2, min(31, round(2 + (100 - quality) * 29 / 99)))
        self._context: Any = None
        self._size = (0, 0)
        self._reformatter = VideoReformatter()
        self.pictures = 0

    def encode(self, pixels: np.ndarray) -> bytes:
        """uint8 [height, width, 3] RGB → a JPEG file."""
        height, width = pixels.shape[:2]
        if self._size != (width, height):
            self._open(width, height)
        frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
        picture: Any = self._reformatter.reformat(frame, format="yuvj420p", threads=1)
        picture.pts = self.pictures
        self.pictures += 1
        return b"".join(bytes(packet) for packet in self._context.encode(picture))

    def _open(self, width: int, height: int) -> None:
        context: Any = av.CodecContext.create("mjpeg", "w")
        context.width, context.height, context.pix_fmt = width, height, "yuvj420p"
        context.time_base, context.thread_count = Fraction(1, 30), 1
        context.options = {"qmin": str(self._scale), "qmax": str(self._scale), "strict": "unofficial"}
        context.open()
        self._context, self._size = context, (width, height)


def decode_jpeg(data: bytes) -> Any:
    """A JPEG file → PyAV's frame. Raises av.error.FFmpegError, ValueError for what is none."""
    if data[:2] != b"\xff\xd8":
        raise ValueError("this is no JPEG file")
    context: Any = av.CodecContext.create("mjpeg", "r")
    context.thread_count = 1
    frames = context.decode(av.Packet(data))
    if not frames:
        raise ValueError("this JPEG file holds no picture")
    return frames[0]
