"""What a source in its reader's thread may ask of the stream it belongs to."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from services.ingest.feed import Feed
from services.ingest.reader import Item
from shared.bus.port import Bus, BusError
from shared.contracts import subjects
from shared.contracts.events import EventKind, StreamEvent
from shared.media.addresses import AddressRules

log = logging.getLogger(__name__)


class Links:
    """Events, a sleep that ends with the stream, and which addresses it may open. Made on the loop, used in the thread."""

    def __init__(self, stream: str, epoch: Callable[[], int], bus: Bus, feed: Feed[Item], rules: AddressRules) -> None:
        self.rules = rules
        self._stream, self._epoch, self._bus, self._feed = stream, epoch, bus, feed
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def stopped(self) -> bool:
        """Whether nobody takes anything any more."""
        return self._feed.stopped

    def wait(self, seconds: float) -> bool:
        """Sleep; False as soon as the stream ends."""
        return self._feed.wait(seconds)

    def tell(self, kind: EventKind, reason: str) -> None:
        """An event of this stream, in the order told."""
        try:
            self._loop.call_soon_threadsafe(self._spawn, kind, reason)
        except RuntimeError:  # the loop is closed
            log.debug("stream %s: %s was not told", self._stream, kind.value)

    def _spawn(self, kind: EventKind, reason: str) -> None:
        task = asyncio.ensure_future(self._publish(kind, reason))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _publish(self, kind: EventKind, reason: str) -> None:
        event = StreamEvent(
            stream=self._stream,
            event=kind,
            service="ingest",
            at_ns=time.time_ns(),
            reason=reason,
            epoch=self._epoch(),
        )
        try:
            await self._bus.publish(subjects.stream(self._stream, "event"), event)
        except (BusError, OSError) as error:  # the picture goes on all the same
            log.warning("stream %s: %s was not told: %s", self._stream, kind.value, error)
