"""Encoded frames of a peer into pictures. Runs in a thread."""

from __future__ import annotations

import logging
from typing import Any

import av
import av.error
from av.codec.context import Flags

from shared.rtc.inbox import EncodedFrame, Inbox

log = logging.getLogger(__name__)

DECODERS = {"H264": "h264", "VP8": "vp8"}


class FrameDecoder:
    """A publisher's pictures; a new one has a decoder of its own. Where one does not decode, a key frame is asked for."""

    def __init__(self, inbox: Inbox) -> None:
        self._inbox = inbox
        self._of = ("", "")
        self._decoder: Any = None
        self.undecodable = 0

    def decode(self, item: EncodedFrame) -> Any:
        """PyAV's frame, the newest if there are several; None when there is none."""
        if (item.session, item.codec) != self._of:
            self._of = (item.session, item.codec)
            self._decoder = av.CodecContext.create(DECODERS[item.codec], "r")
            self._decoder.thread_count = 1  # frame threads hold frames back
            self._decoder.flags |= Flags.low_delay
        packet: Any = av.Packet(item.data)
        try:
            frames = self._decoder.decode(packet)
        except av.error.FFmpegError as error:
            self.undecodable += 1
            self._inbox.undecodable = True
            log.debug("a frame does not decode: %s", error)
            return None
        return frames[-1] if frames else None
