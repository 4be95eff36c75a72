"""Taps on the WebRTC library's receivers: encoded frames come here instead of into its decoders. One of the files that
know the library's insides.

The library has no way to get at encoded frames, and its queues of decoded ones are not bounded.
"""

from __future__ import annotations

import asyncio
import queue
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from shared.rtc.arrival import ArrivalClock
from shared.rtc.inbox import EncodedFrame, EncodedSound, Inbox
from shared.rtc.jitter import Frame, FrameBuffer

VIDEO_RATE, AUDIO_RATE = 90_000, 48_000


class VideoTap:
    """Frames of one publisher's video track into the inbox."""

    def __init__(
        self, session: str, receiver: Any, codecs: dict[int, str], inbox: Inbox, seen: Callable[[], None]
    ) -> None:
        self._session, self._receiver, self._inbox, self._seen = session, receiver, inbox, seen
        self._clock = ArrivalClock(VIDEO_RATE)
        self.frames = FrameBuffer(lambda payload_type: codecs.get(payload_type, "H264"), time.time_ns)
        self._ssrc: int | None = None
        self._asking: set[asyncio.Task[None]] = set()
        receiver._RTCRtpReceiver__jitter_buffer = self
        receiver._RTCRtpReceiver__decoder_queue = _Silent()

    def add(self, packet: Any) -> tuple[bool, None]:
        """In place of the library's jitter buffer: a packet came. True: ask for a key frame."""
        self._ssrc = packet.ssrc
        if self._inbox.undecodable:
            self._inbox.undecodable = False
            self.frames.lost_picture()
        ask, first = self.frames.add(packet)
        for frame in ([first] if first is not None else []) + self.frames.ready():
            self._give(frame)
        return ask, None

    def ask_key(self) -> None:
        """Ask the publisher for a key frame now."""
        self.frames.lost_picture()
        if self._ssrc is not None:
            task = asyncio.ensure_future(self._receiver._send_rtcp_pli(self._ssrc))
            self._asking.add(task)
            task.add_done_callback(self._asking.discard)

    def _give(self, frame: Frame) -> None:
        self._seen()
        captured = self._clock.captured_ns(frame.timestamp, frame.arrived_ns)
        self._inbox.put(EncodedFrame(self._session, frame.codec, frame.data, captured, frame.key))


class AudioTap:
    """Opus packets of one publisher into the inbox, in the order of the library's own buffer."""

    def __init__(self, session: str, receiver: Any, inbox: Inbox) -> None:
        self._session, self._inbox = session, inbox
        self._clock = ArrivalClock(AUDIO_RATE)
        receiver._RTCRtpReceiver__decoder_queue = _Silent(self._give)

    def _give(self, codec: Any, encoded: Any) -> None:
        if codec.name.lower() == "opus" and encoded.data:
            captured = self._clock.captured_ns(encoded.timestamp, time.time_ns())
            self._inbox.put(EncodedSound(self._session, encoded.data, captured, encoded.timestamp))


class _Silent:
    """In place of the queue to the library's decoder: its thread sees nothing but the end."""

    def __init__(self, give: Callable[[Any, Any], None] | None = None) -> None:
        self._give = give
        self._end: queue.Queue[None] = queue.Queue()

    def put(self, item: Any) -> None:
        """From the receiver: an encoded frame, or None at the end."""
        if item is None:
            self._end.put(None)
        elif self._give is not None:
            self._give(*item)

    def get(self) -> None:
        """From the decoder's thread."""
        return self._end.get()


def only_opus(transceiver: Any) -> None:
    """Sound is answered with Opus alone, where it is offered: it is passed on as it is."""
    opus = [codec for codec in transceiver._codecs if codec.name.lower() == "opus"]
    transceiver._codecs = opus or transceiver._codecs


async def drain(track: Any) -> None:
    """Wait for the end of a tapped track: its sender said goodbye, or is gone."""
    with suppress(Exception):  # the library tells the end by raising
        while True:
            await track.recv()
