"""VP8 for clients that take nothing else: no delay, one thread, a key frame when one is asked for."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import av
from av.video.frame import PictureType
from av.video.reformatter import VideoReformatter

from services.egress.rtc.fanout import Encoded
from services.egress.rtc.live_h264 import BITS_PER_PIXEL, KEYFRAME_EVERY, MAX_RATE, MIN_RATE, VIDEO_RATE
from services.egress.sinks.port import OutFrame


class LiveVp8:
    """One encoder. Colours are those that VP8 has: BT.601, limited range."""

    def __init__(self, width: int, height: int) -> None:
        rate = int(min(MAX_RATE, max(MIN_RATE, width * height * BITS_PER_PIXEL)))
        codec: Any = av.CodecContext.create("libvpx", "w")
        codec.width, codec.height, codec.pix_fmt = width, height, "yuv420p"
        codec.time_base = Fraction(1, VIDEO_RATE)
        codec.framerate = Fraction(30)
        codec.thread_count = 1
        codec.bit_rate = rate
        codec.gop_size = KEYFRAME_EVERY
        codec.qmin, codec.qmax = 4, 50
        codec.options = {
            "deadline": "realtime",
            "cpu-used": "8",
            "lag-in-frames": "0",
            "crf": "10",
            "maxrate": str(rate),
            "bufsize": str(rate // 2),
            "auto-alt-ref": "0",
        }
        self._codec = codec
        self._reformatter = VideoReformatter()

    def encode(self, frame: OutFrame, pts: int, key: bool) -> list[Encoded]:
        """The packets of one frame, one as a rule; ``pts`` in 90 kHz ticks, ascending."""
        rgb = av.VideoFrame.from_ndarray(frame.pixels, format="rgb24")
        picture = self._reformatter.reformat(rgb, format="yuv420p", threads=1)
        picture.pts, picture.time_base = pts, Fraction(1, VIDEO_RATE)
        picture.pict_type = PictureType.I if key else PictureType.NONE
        return [Encoded(bytes(packet), packet.pts, packet.is_keyframe) for packet in self._codec.encode(picture)]
