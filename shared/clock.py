"""Time as a port: the system's, or a virtual one that tests and the simulator move by hand."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import time
from typing import Protocol


class Clock(Protocol):
    """``now_ns`` is UNIX nanoseconds (may be set back by an operator), ``monotonic`` seconds that never go back."""

    def now_ns(self) -> int: ...

    def monotonic(self) -> float: ...

    async def sleep(self, seconds: float) -> None: ...


class SystemClock:
    """The computer's clock."""

    def now_ns(self) -> int:
        return time.time_ns()

    def monotonic(self) -> float:
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


class VirtualClock:
    """A clock that stands still until ``advance`` is called. Sleepers wake in the order of their times."""

    def __init__(self, start_ns: int = 1_700_000_000_000_000_000) -> None:
        self._start_ns = start_ns
        self._elapsed_ns = 0
        self._order = itertools.count()
        self._sleepers: list[tuple[int, int, asyncio.Future[None]]] = []

    def now_ns(self) -> int:
        return self._start_ns + self._elapsed_ns

    def monotonic(self) -> float:
        return self._elapsed_ns / 1e9

    async def sleep(self, seconds: float) -> None:
        if seconds <= 0:
            await asyncio.sleep(0)
            return
        woken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._sleepers, (self._elapsed_ns + int(seconds * 1e9), next(self._order), woken))
        await woken

    def jump(self, seconds: float) -> None:
        """Move time without waking anyone: for synchronous code that has no event loop."""
        self._elapsed_ns += int(seconds * 1e9)

    async def advance(self, seconds: float) -> None:
        """Move time by ``seconds``, waking each sleeper at its own moment and letting it run."""
        until = self._elapsed_ns + int(seconds * 1e9)
        await asyncio.sleep(0)
        while self._sleepers and self._sleepers[0][0] <= until:
            due, _, woken = heapq.heappop(self._sleepers)
            self._elapsed_ns = max(self._elapsed_ns, due)
            if not woken.done():
                woken.set_result(None)
            # One turn of the loop wakes the sleeper, the next lets what it started begin.
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        self._elapsed_ns = until
        await asyncio.sleep(0)
