"""A bounded queue between one producer side and one reader, with an overflow policy and a counter."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Generic, TypeVar

from shared.bus.port import Overflow

T = TypeVar("T")


class MailboxClosedError(RuntimeError):
    """The mailbox was closed; ``get`` has nothing more to give."""


class Mailbox(Generic[T]):
    """``put`` never waits. One reader at a time may wait in ``get``.

    ``dropped`` counts what overflowed, ``episodes`` how often overflowing began: an episode ends when the mailbox has
    run empty.
    """

    def __init__(self, size: int, overflow: Overflow = Overflow.DROP_NEWEST) -> None:
        if size < 1:
            raise ValueError(f"a mailbox of {size} messages cannot hold anything: give 1 or more")
        self.size = size
        self.overflow = overflow
        self.dropped = 0
        self.episodes = 0
        self.closed = False
        self._overflowing = False
        self._items: deque[T] = deque()
        self._waiter: asyncio.Future[None] | None = None

    def __len__(self) -> int:
        return len(self._items)

    def put(self, item: T) -> bool:
        """Add ``item``. False when something (this item or, by policy, the oldest one) was dropped, or it is closed."""
        if self.closed:
            return False
        fits = len(self._items) < self.size
        if not fits:
            self.dropped += 1
            if not self._overflowing:
                self._overflowing = True
                self.episodes += 1
            if self.overflow is Overflow.DROP_NEWEST:
                return False
            self._items.popleft()
        self._items.append(item)
        self._wake()
        return fits

    async def get(self) -> T:
        """The oldest item, waiting for one. Raises MailboxClosedError once closed and empty."""
        while not self._items:
            self._overflowing = False
            if self.closed:
                raise MailboxClosedError
            if self._waiter is not None and not self._waiter.done():
                raise RuntimeError("a mailbox has one reader")
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        return self._items.popleft()

    def close(self, *, discard: bool = False) -> None:
        """Take nothing more. The reader gets what is left first, unless it is discarded."""
        self.closed = True
        if discard:
            self._items.clear()
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
