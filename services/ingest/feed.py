"""The bounded hand-over from a reader's thread to the event loop."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Feed(Generic[Item]):
    """A queue of ``size`` items. The thread waits while it is full: nothing is dropped here.

    ``wake`` is set on the loop whenever an item came. ``stop`` lets the thread go, with whatever it holds. While it is held
    (``hold``) the thread waits with the next item; ``holds`` counts how often that was over, so that the thread can tell
    that time has passed.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, wake: asyncio.Event, size: int) -> None:
        self._loop, self._wake, self._size = loop, wake, size
        self._items: deque[Item] = deque()
        self._changed = threading.Condition()
        self._stopped = self._held = False
        self.holds = 0

    @property
    def stopped(self) -> bool:
        """Whether nobody takes items any more."""
        return self._stopped

    def put(self, item: Item) -> bool:
        """From the thread: hand over ``item``, waiting for room. False when the feed was stopped."""
        with self._changed:
            while (self._held or len(self._items) >= self._size) and not self._stopped:
                self._changed.wait()
            if self._stopped:
                return False
            self._items.append(item)
            first = len(self._items) == 1
        if first:
            try:
                self._loop.call_soon_threadsafe(self._wake.set)
            except RuntimeError:  # the loop is closed
                return False
        return True

    def wait(self, seconds: float) -> bool:
        """From the thread: sleep, or until stopped. False when stopped."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped, timeout=seconds)
            return not self._stopped

    def pop(self) -> Item | None:
        """From the loop: the next item, if there is one."""
        with self._changed:
            if not self._items:
                return None
            item = self._items.popleft()
            self._changed.notify_all()
            return item

    def hold(self) -> None:
        """From the loop: take nothing more until :meth:`go_on`. What is in the queue stays."""
        with self._changed:
            self._held = True

    def go_on(self) -> None:
        """From the loop: take items again."""
        with self._changed:
            self._held = False
            self.holds += 1
            self._changed.notify_all()

    def stop(self) -> None:
        """From the loop: end the hand-over. What waits is discarded."""
        with self._changed:
            self._stopped = True
            self._items.clear()
            self._changed.notify_all()
