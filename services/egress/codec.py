"""H.264 encoding of RGB frames with their own timestamps."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import av
import numpy as np
from av.video.reformatter import ColorPrimaries, Colorspace, ColorTrc, VideoReformatter

from services.egress.sinks.port import OutFrame

SMALL_PIXELS = 700_000
KEYFRAME_EVERY = 48  # frames: seeking and salvaging work in steps of a few seconds


def h264_options(width: int, height: int) -> dict[str, str]:
    """x264 options: one thread, no reordering, quality rather than rate is held; larger pictures get a faster preset."""
    return {
        "preset": "veryfast" if width * height <= SMALL_PIXELS else "superfast",
        "tune": "zerolatency",
        "crf": "20",
        "bf": "0",
        "g": str(KEYFRAME_EVERY),
        "x264-params": "threads=1:lookahead-threads=1:sliced-threads=0",
    }


class YuvConverter:
    """RGB to what H.264 takes: BT.709, limited range, one thread. One per stream: it keeps its tables."""

    def __init__(self) -> None:
        self._reformatter = VideoReformatter()

    def convert(self, pixels: np.ndarray) -> Any:
        """uint8 [height, width, 3] → a yuv420p frame without a timestamp."""
        rgb = av.VideoFrame.from_ndarray(pixels, format="rgb24")
        return self._reformatter.reformat(
            rgb, format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range="MPEG", threads=1
        )


class H264Track:
    """The video stream of an output container and the conversion into it.

    ``rate`` is only a hint for the encoder's rate control. Colours are BT.709, limited range, and say so.
    """

    def __init__(self, container: Any, width: int, height: int, time_base: Fraction, rate: Fraction) -> None:
        stream: Any = container.add_stream("libx264", rate=rate, options=h264_options(width, height))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        context = stream.codec_context
        context.time_base = time_base
        context.thread_count = 1
        context.color_range = 1
        context.colorspace = 1
        context.color_primaries = ColorPrimaries.BT709
        context.color_trc = ColorTrc.BT709
        stream.time_base = time_base
        self.stream = stream
        self._container = container
        self._time_base = time_base
        self._yuv = YuvConverter()
        self._durations: dict[int, int] = {}

    def write(self, frame: OutFrame) -> None:
        """Encode one frame and hand its packets to the container."""
        picture = self._yuv.convert(frame.pixels)
        picture.pts, picture.time_base = frame.pts, self._time_base
        self._durations[frame.pts] = frame.duration
        self._mux(self.stream.encode(picture))

    def flush(self) -> None:
        """What the encoder still holds."""
        self._mux(self.stream.encode(None))

    def _mux(self, packets: list[Any]) -> None:
        for packet in packets:
            # The muxer takes the next timestamp as a frame's end; only the last frame's own duration is used.
            duration = self._durations.pop(packet.pts, 0)
            if duration:
                packet.duration = duration
            self._container.mux(packet)
