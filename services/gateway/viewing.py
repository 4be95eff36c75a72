"""Pictures for browsers: one subscription a stream however many look, and none while nobody does.

While somebody looks the gateway says so (``Looking``); egress and ingest then encode once, for all viewers. Each viewer has the
newest picture only: who is slow misses some, which is counted, and holds up nobody.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from services.gateway.errors import BusyError, NoAnswerError
from shared.bus.port import Bus, BusError, Overflow, Received, Subscription
from shared.contracts import subjects
from shared.contracts.sinks import FramePublished, Looking, SourcePreviewed

log = logging.getLogger(__name__)

What = Literal["result", "source"]
LEAVES: dict[What, str] = {"result": "out", "source": "preview"}
LOOK_EVERY_S = 2.0
LINGER_S = 3.0  # a page that asks again and again does not make the stream begin anew each time
SNAPSHOT_S = 8.0
QUIET_S = 30.0


@dataclass(frozen=True, slots=True)
class Picture:
    """One JPEG. ``key`` tells it from the one before; ``captured_ns`` is when the source's frame was taken."""

    data: bytes
    key: tuple[int, int]
    captured_ns: int


@dataclass(slots=True, eq=False)
class Viewer:
    """One client. ``newest`` waits for it; ``missed`` were overwritten before it took them."""

    came: asyncio.Event = field(default_factory=asyncio.Event)
    newest: Picture | None = None
    missed: int = 0
    over: bool = False

    def show(self, picture: Picture) -> bool:
        """The newest wins; whether one was missed for it."""
        missed = self.newest is not None
        self.missed += missed
        self.newest = picture
        self.came.set()
        return missed


@dataclass(slots=True)
class _Feed:
    """The pictures of one stream, source or result, while somebody looks."""

    viewers: set[Viewer] = field(default_factory=lambda: set[Viewer]())
    subscription: Subscription | None = None
    task: asyncio.Task[None] | None = None
    last: tuple[int, int] = (-2, -2)


class Viewing:
    """The feeds of all streams. ``counters``: pictures that came, that viewers missed, viewers that were turned away."""

    def __init__(self, bus: Bus, max_viewers: int) -> None:
        self._bus, self._max_viewers = bus, max_viewers
        self._feeds: dict[tuple[str, What], _Feed] = {}
        self._viewers = 0
        self.counters: dict[str, int] = {"pictures": 0, "missed": 0, "turned_away": 0}

    def viewers(self, stream: str, what: What = "result") -> int:
        """How many look now."""
        feed = self._feeds.get((stream, what))
        return 0 if feed is None else len(feed.viewers)

    async def pictures(self, stream: str, what: What = "result", quiet_s: float = QUIET_S) -> AsyncIterator[Picture]:
        """Pictures as they come, until the stream ends or none came for ``quiet_s``. Raises BusyError."""
        with self._viewer(stream, what) as viewer:
            while not viewer.over:
                try:
                    await asyncio.wait_for(viewer.came.wait(), quiet_s)
                except TimeoutError:
                    return
                viewer.came.clear()
                picture, viewer.newest = viewer.newest, None
                if picture is not None:
                    yield picture

    async def snapshot(self, stream: str, what: What = "result", within_s: float = SNAPSHOT_S) -> Picture:
        """The next picture. Raises NoAnswerError when none comes in time, BusyError."""
        async for picture in self.pictures(stream, what, within_s):
            return picture
        raise NoAnswerError(
            f"stream {stream} showed no picture within {within_s:g} s: is it paused, or its source gone?"
        )

    def ended(self, stream: str) -> None:
        """The stream has ended: its viewers are let go."""
        for what in LEAVES:
            feed = self._feeds.get((stream, what))
            for viewer in feed.viewers if feed is not None else ():
                viewer.over = True
                viewer.came.set()

    async def close(self) -> None:
        """Let everybody go."""
        for stream, _ in list(self._feeds):
            self.ended(stream)
        tasks = [feed.task for feed in self._feeds.values() if feed.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    @contextmanager
    def _viewer(self, stream: str, what: What) -> Generator[Viewer]:
        if self._viewers >= self._max_viewers:
            self.counters["turned_away"] += 1
            raise BusyError(f"{self._max_viewers} viewers look already")
        key: tuple[str, What] = (stream, what)
        viewer = Viewer()
        feed = self._feeds.get(key)
        if feed is None:
            feed = self._feeds[key] = _Feed()
            feed.task = asyncio.create_task(self._run(stream, what, feed), name=f"view-{stream}-{what}")
        feed.viewers.add(viewer)
        self._viewers += 1
        try:
            yield viewer
        finally:
            self._viewers -= 1
            feed.viewers.discard(viewer)

    async def _run(self, stream: str, what: What, feed: _Feed) -> None:
        """Listen and say that somebody looks, until nobody has for a while."""

        async def on_picture(received: Received) -> None:
            self._show(feed, received.message)

        idle_s = 0.0
        try:
            feed.subscription = await self._bus.subscribe(
                subjects.stream(stream, LEAVES[what]), on_picture, size=4, overflow=Overflow.DROP_OLDEST
            )
            while feed.viewers or idle_s < LINGER_S:
                if feed.viewers:
                    idle_s = 0.0
                    await self._bus.publish(subjects.stream(stream, "looking"), Looking(stream=stream, what=what))
                    await asyncio.sleep(LOOK_EVERY_S)
                else:
                    await asyncio.sleep(LINGER_S / 3)
                    idle_s += LINGER_S / 3
        except BusError as error:
            log.warning("stream %s is not shown: %s", stream, error)
        finally:
            self._feeds.pop((stream, what), None)
            for viewer in feed.viewers:  # the bus failed: they come back
                viewer.over = True
                viewer.came.set()
            if feed.subscription is not None:
                await feed.subscription.unsubscribe()

    def _show(self, feed: _Feed, message: FramePublished | SourcePreviewed) -> None:
        if isinstance(message, FramePublished):
            if message.format != "jpeg":
                return  # of a sink that publishes whole pixels
            key = (message.chunk, message.pts)
        else:
            key = (-1, message.captured_ns)
        if key == feed.last:
            return  # a sink publishes the same frame beside the preview
        feed.last = key
        self.counters["pictures"] += 1
        picture = Picture(message.data, key, message.captured_ns)
        for viewer in feed.viewers:
            self.counters["missed"] += viewer.show(picture)
