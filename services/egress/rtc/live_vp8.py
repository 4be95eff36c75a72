"""VP8 for clients that take nothing else: no delay, one thread, a key frame when one is asked for."""

from __future__ import annotations

import av
from av.video.reformatter import VideoReformatter

from services.egress.rtc.fanout import Encoded
from services.egress.rtc.live_h264 import KEYFRAME_EVERY, encoded, live_codec
from services.egress.sinks.port import OutFrame


class LiveVp8:
    """One encoder. Colours are those that VP8 has: BT.601, limited range."""

    def __init__(self, width: int, height: int) -> None:
        codec, rate = live_codec("libvpx", width, height)
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
        return encoded(self._codec, picture, pts, key)
