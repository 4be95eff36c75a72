"""Chunks that are not to be encoded here yet: of an epoch that begins later, or of a stream whose state is on its way.

A stream that changes its pipeline is on two for a moment. The new one lets its chunks wait until the state is there; the old
one keeps what comes of the newer epoch, in case it has to go on after all. Nothing of what waits has been touched: who lets
it go without encoding it leaves its pixels to the other.
"""

from __future__ import annotations

import asyncio
from collections import deque

from shared.bus.port import Handler, Received
from shared.contracts.events import ChunkCaptured


class ChunkGate:
    """One stream's chunks on their way into encode. Bounded by ``size``, which the stream's credits never reach."""

    def __init__(self, handler: Handler, epoch: int, hold: bool, size: int) -> None:
        self.since = self.epoch = epoch  # the oldest epoch that is taken, and the newest
        self.held = hold
        self.lost = 0
        self._handler = handler
        self._waiting: deque[Received] = deque()
        self._size = size
        self._order = asyncio.Lock()  # chunks reach the handler one after the other, those that waited first

    def takes(self, epoch: int) -> bool:
        """Whether chunks of this epoch are this worker's."""
        return self.since <= epoch <= self.epoch

    async def on_chunk(self, received: Received) -> None:
        """Hand on, or keep for later."""
        async with self._order:
            message = received.message
            if isinstance(message, ChunkCaptured):
                epoch = message.stamp.epoch
                if epoch > self.epoch or (self.held and epoch == self.epoch):
                    if len(self._waiting) < self._size:
                        self._waiting.append(received)
                    else:
                        self.lost += 1
                    return
            await self._handler(received)

    async def go_on(self, epoch: int, hold: bool = False) -> None:
        """Take chunks up to this epoch; what waited of them comes first."""
        async with self._order:
            self.epoch = max(self.epoch, epoch)
            self.held = hold
            if hold:
                return
            waiting, self._waiting = self._waiting, deque()
            for received in waiting:
                if received.message.stamp.epoch > self.epoch:
                    self._waiting.append(received)
                else:
                    await self._handler(received)

    def __len__(self) -> int:
        return len(self._waiting)
