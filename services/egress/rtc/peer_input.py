"""The video that a client of both ways sends, handed to ingest as pushed frames: decoded, made no larger than the stream needs,
one whole picture a message. The newest wins: what waits behind it is left out and counted."""

from __future__ import annotations

import asyncio
import logging
import math
import threading
from collections.abc import Awaitable, Callable
from typing import Any

from av.video.reformatter import VideoReformatter

from shared.bus.port import BusError
from shared.contracts.sources import MAX_PUSHED_BYTES, PushedFrame
from shared.media.jpeg import JpegEncoder
from shared.rtc.decoding import FrameDecoder
from shared.rtc.inbox import EncodedFrame, Inbox, Over

log = logging.getLogger(__name__)

QUALITIES = (90, 70, 40)  # the next one when a picture does not fit into a message


def covering(width: int, height: int, target_width: int, target_height: int) -> tuple[int, int]:
    """The smallest even size of the same aspect that covers the target; a smaller picture stays as it is."""
    scale = max(target_width / width, target_height / height)
    if scale >= 1:
        return width, height
    return 2 * math.ceil(width * scale / 2), 2 * math.ceil(height * scale / 2)


class PeerInput:
    """One stream's. ``inbox`` is filled on the loop, read by a thread; ``push`` runs on the loop, one at a time."""

    def __init__(self, stream: str, size: tuple[int, int], push: Callable[[PushedFrame], Awaitable[None]]) -> None:
        self._stream, self.size, self._push = stream, size, push
        self.inbox = Inbox()
        self.counters = {"peer_frames_pushed": 0, "peer_frames_left_out": 0, "peer_frames_not_pushed": 0}
        self._loop = asyncio.get_running_loop()
        self._newest: PushedFrame | None = None
        self._came = asyncio.Event()
        self._pusher: asyncio.Task[None] | None = None
        self._thread = threading.Thread(target=self._run, name=f"peer-{stream}", daemon=True)

    def start(self) -> None:
        """Begin to take frames."""
        self._pusher = asyncio.create_task(self._push_all(), name=f"peer-push-{self._stream}")
        self._thread.start()

    async def close(self) -> None:
        """Take nothing more."""
        self.inbox.end()
        if self._pusher is not None:
            self._pusher.cancel()
            await asyncio.gather(self._pusher, return_exceptions=True)
        if self._thread.ident is not None:
            await asyncio.to_thread(self._thread.join, 5.0)

    # --- the thread --------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        decoder, pictures = FrameDecoder(self.inbox), _Pictures()
        while not isinstance(item := self.inbox.get(), Over):
            if not isinstance(item, EncodedFrame):
                continue
            frame = decoder.decode(item)
            if frame is None:
                continue
            if self.inbox.waiting:
                self.counters["peer_frames_left_out"] += 1
                continue
            try:
                data = pictures.jpeg(frame, self.size)
            except Exception:
                # A frame of an odd kind costs itself; the thread must go on.
                log.exception("stream %s: a frame of its client is left out", self._stream)
                data = b""
            if not data:
                self.counters["peer_frames_left_out"] += 1
                continue
            pushed = PushedFrame(stream=self._stream, data=data, captured_ns=item.captured_ns)
            try:
                self._loop.call_soon_threadsafe(self._put, pushed)
            except RuntimeError:  # the loop is closed
                return

    # --- the loop ----------------------------------------------------------------------------------------------------

    def _put(self, pushed: PushedFrame) -> None:
        if self._newest is not None:
            self.counters["peer_frames_left_out"] += 1
        self._newest = pushed
        self._came.set()

    async def _push_all(self) -> None:
        while True:
            await self._came.wait()
            self._came.clear()
            pushed, self._newest = self._newest, None
            if pushed is None:
                continue
            try:
                await self._push(pushed)
                self.counters["peer_frames_pushed"] += 1
            except (BusError, OSError) as error:
                self.counters["peer_frames_not_pushed"] += 1
                log.debug("stream %s: a frame is not pushed: %s", self._stream, error)


class _Pictures:
    """Frames as JPEG files that fit into a message."""

    def __init__(self) -> None:
        self._reformatter = VideoReformatter()
        self._quality = 0
        self._encoder = JpegEncoder(QUALITIES[0])

    def jpeg(self, frame: Any, size: tuple[int, int]) -> bytes:
        """A PyAV frame; nothing when it does not fit at the lowest quality."""
        width, height = covering(frame.width, frame.height, *size)
        pixels = self._reformatter.reformat(frame, width, height, format="rgb24", threads=1).to_ndarray()
        while len(data := self._encoder.encode(pixels)) > MAX_PUSHED_BYTES:
            if self._quality + 1 >= len(QUALITIES):
                return b""
            self._quality += 1
            self._encoder = JpegEncoder(QUALITIES[self._quality])
        return data
