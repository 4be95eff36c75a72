"""Encoded packets as tracks of the WebRTC library. The only file of egress that knows the library's insides."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import av
from aiortc import MediaStreamTrack, RTCRtpSender
from aiortc.mediastreams import MediaStreamError

from services.egress.rtc.fanout import Queue
from services.egress.rtc.live_h264 import VIDEO_RATE
from services.egress.rtc.opus import OPUS_RATE

RATES = {"video": VIDEO_RATE, "audio": OPUS_RATE}


class PacketTrack(MediaStreamTrack):
    """What stands in a viewer's queue, as it comes."""

    def __init__(self, kind: str, queue: Queue) -> None:
        super().__init__()
        self.kind = kind
        self._queue = queue
        self._base = Fraction(1, RATES[kind])
        self._came = asyncio.Event()
        queue.wake = self._came.set

    async def recv(self) -> Any:
        """The next packet."""
        while (packet := self._queue.pop()) is None:
            if self.readyState != "live":
                raise MediaStreamError
            self._came.clear()
            await self._came.wait()
        out = av.Packet(packet.data)
        out.pts, out.time_base = packet.pts, self._base
        return out

    def stop(self) -> None:
        """No packet follows."""
        super().stop()
        self._came.set()


def h264_only() -> list[Any]:
    """What a viewer's video is negotiated with."""
    codecs = RTCRtpSender.getCapabilities("video").codecs
    return [codec for codec in codecs if codec.mimeType.lower() in ("video/h264", "video/rtx")]


def h264_or_vp8() -> list[Any]:
    """What a client of both ways is negotiated with: H.264 is encoded once with the viewers'; some offer VP8 alone."""
    codecs = RTCRtpSender.getCapabilities("video").codecs
    return [*h264_only(), *(codec for codec in codecs if codec.mimeType.lower() == "video/vp8")]


def opus_only() -> list[Any]:
    """… and the sound."""
    codecs = RTCRtpSender.getCapabilities("audio").codecs
    return [codec for codec in codecs if codec.mimeType.lower() == "audio/opus"]


def on_key_request(sender: Any, ask: Callable[[], None]) -> None:
    """Have a viewer's request for a key frame (PLI, FIR) answered by the shared encoder."""
    sender._send_keyframe = ask
