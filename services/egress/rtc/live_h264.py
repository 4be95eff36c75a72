"""H.264 for viewers who join at any time: constrained baseline, no delay, parameters in every key frame."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import av
from av.video.frame import PictureType

from services.egress.codec import YuvConverter
from services.egress.rtc.fanout import Encoded
from services.egress.sinks.port import OutFrame

VIDEO_RATE = 90_000
KEYFRAME_EVERY = 240  # frames; whoever needs one earlier asks
SMALL_PIXELS = 700_000
BITS_PER_PIXEL = 6.0  # a second at most, so that a busy picture does not burst: 640 × 352 may have 1.35 Mbit/s
MIN_RATE, MAX_RATE = 400_000, 12_000_000


def live_codec(name: str, width: int, height: int) -> tuple[Any, int]:
    """A context for a call's pictures, on one thread, and the most bits a second that it should make."""
    codec: Any = av.CodecContext.create(name, "w")
    codec.width, codec.height, codec.pix_fmt = width, height, "yuv420p"
    codec.time_base = Fraction(1, VIDEO_RATE)
    codec.framerate = Fraction(30)
    codec.thread_count = 1
    return codec, int(min(MAX_RATE, max(MIN_RATE, width * height * BITS_PER_PIXEL)))


def encoded(codec: Any, picture: Any, pts: int, key: bool) -> list[Encoded]:
    """The packets of one picture, one as a rule; ``pts`` in 90 kHz ticks, ascending."""
    picture.pts, picture.time_base = pts, Fraction(1, VIDEO_RATE)
    picture.pict_type = PictureType.I if key else PictureType.NONE
    return [Encoded(bytes(packet), packet.pts, packet.is_keyframe) for packet in codec.encode(picture)]


class LiveH264:
    """One encoder. Colours are BT.709, limited range, and say so."""

    def __init__(self, width: int, height: int) -> None:
        codec, rate = live_codec("libx264", width, height)
        codec.color_range, codec.colorspace, codec.color_primaries, codec.color_trc = 1, 1, 1, 1
        codec.options = {
            "preset": "veryfast" if width * height <= SMALL_PIXELS else "superfast",
            "tune": "zerolatency",
            "profile": "baseline",
            "crf": "22",
            "maxrate": str(rate),
            "bufsize": str(rate // 2),
            "g": str(KEYFRAME_EVERY),
            "forced-idr": "1",
            "x264-params": "repeat-headers=1:annexb=1:threads=1:sliced-threads=0:scenecut=0",
        }
        self._codec = codec
        self._yuv = YuvConverter()

    def encode(self, frame: OutFrame, pts: int, key: bool) -> list[Encoded]:
        """The packets of one frame, one as a rule; ``pts`` in 90 kHz ticks, ascending."""
        return encoded(self._codec, self._yuv.convert(frame.pixels), pts, key)
