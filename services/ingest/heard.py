"""What is heard on the bus for one source: the frames pushed to it, and who looks at it."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from contextlib import suppress

import numpy as np

from shared.bus.port import Bus, BusError, Received, Subscription
from shared.contracts import subjects
from shared.contracts.sinks import Looking, SourcePreviewed
from shared.contracts.sources import PushedFrame
from shared.media.jpeg import JpegEncoder

log = logging.getLogger(__name__)

MAX_PUSHED = 4
LOOKING_S = 5.0


class Heard:
    """``start`` and ``close`` are for the loop, ``pushed`` and ``preview`` for the source's thread."""

    def __init__(self, stream: str, bus: Bus) -> None:
        self._stream, self._bus = stream, bus
        self._loop = asyncio.get_running_loop()
        self._subscriptions: list[Subscription] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._pushed: deque[PushedFrame] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._jpeg = JpegEncoder()
        self._looking_until = self._gap_s = self._preview_at = 0.0
        self.counters: dict[str, int] = {}

    async def start(self, pushes: bool) -> None:
        """Raises BusError."""
        self._subscriptions.append(
            await self._bus.subscribe(subjects.stream(self._stream, "looking"), self._on_looking)
        )
        if pushes:
            self._subscriptions.append(await self._bus.subscribe(subjects.stream(self._stream, "push"), self._on_push))

    async def close(self) -> None:
        """Hear nothing more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for subscription in self._subscriptions:
            with suppress(BusError):
                await subscription.unsubscribe()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _on_push(self, received: Received) -> None:
        frame: PushedFrame = received.message
        with self._changed:
            if len(self._pushed) >= MAX_PUSHED:  # the newest wins
                self._pushed.popleft()
                self.count("pushed_overwritten")
            self._pushed.append(frame)
            self._changed.notify()

    async def _on_looking(self, received: Received) -> None:
        message: Looking = received.message
        if message.what == "source":
            self._gap_s, self._looking_until = 0.9 / message.max_fps, time.monotonic() + LOOKING_S

    # --- in the source's thread --------------------------------------------------------------------------------------

    def count(self, name: str) -> None:
        """Something that should be rare."""
        self.counters[name] = self.counters.get(name, 0) + 1

    def pushed(self, seconds: float) -> PushedFrame | None:
        """The next pushed frame; None when none came for so long."""
        with self._changed:
            self._changed.wait_for(lambda: self._pushed or self._closed, timeout=seconds)
            return self._pushed.popleft() if self._pushed else None

    def preview(self, pixels: np.ndarray, captured_ns: int) -> None:
        """A fitted frame, for those who look at the source; nobody looks: nothing is encoded."""
        now = time.monotonic()
        if now >= self._looking_until or now - self._preview_at < self._gap_s or pixels.size == 0:
            return
        self._preview_at = now
        self.count("previews")
        height, width = pixels.shape[:2]
        data = self._jpeg.encode(pixels)
        message = SourcePreviewed(stream=self._stream, captured_ns=captured_ns, width=width, height=height, data=data)
        with suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._publish_soon, message)

    def _publish_soon(self, message: SourcePreviewed) -> None:
        task = asyncio.ensure_future(self._publish(message))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _publish(self, message: SourcePreviewed) -> None:
        try:
            await self._bus.publish(subjects.stream(self._stream, "preview"), message)
        except (BusError, OSError) as error:
            log.debug("stream %s: a preview was not published: %s", self._stream, error)
