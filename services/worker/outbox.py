"""Messages out, in the order their jobs finished. Device callbacks are synchronous; publishing is not."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable

log = logging.getLogger(__name__)


class Outbox:
    """One task sends what callbacks put here. Bounded by the device's own queues: a job puts one entry when it ends."""

    def __init__(self) -> None:
        self._entries: deque[Callable[[], Awaitable[None]]] = deque()
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._closing = False

    def start(self) -> None:
        """Begin sending."""
        self._task = asyncio.create_task(self._main(), name="outbox")

    def put(self, send: Callable[[], Awaitable[None]]) -> None:
        """Queue one send. Call it on the event loop."""
        self._entries.append(send)
        self._wake.set()

    async def close(self, deadline_s: float = 2.0) -> None:
        """Send what is queued, then end."""
        self._closing = True
        self._wake.set()
        if self._task is not None:
            await asyncio.wait({self._task}, timeout=deadline_s)
            self._task.cancel()

    async def _main(self) -> None:
        while True:
            while self._entries:
                send = self._entries.popleft()
                try:
                    await send()
                except Exception:
                    log.exception("a message could not be sent")
            if self._closing:
                return
            self._wake.clear()
            if not self._entries and not self._closing:
                await self._wake.wait()
