"""The thread that feeds one stream's sinks: encoding never holds up the event loop, and its queue is bounded."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from services.egress.sinks.port import OutFrame, Sink, SinkError
from shared.contracts.events import AudioCaptured
from shared.media.errors import one_line
from shared.media.steadying import Steadier

log = logging.getLogger(__name__)

# Sound is small and must not be lost while pictures wait: it has a bound of its own, far above any real use.
MAX_AUDIO_PARTS = 4096


@dataclass(frozen=True, slots=True)
class _Remove:
    """In order with the frames: this sink gets no more."""

    name: str
    made: asyncio.Future[str]


class SinkThread:
    """Sinks of one stream in one thread. ``room`` says how many frames may be put now. Frames are steadied here, once for all.

    ``poke`` is called on the loop when room came back or a sink broke; ``error`` is then one line.
    """

    def __init__(
        self, name: str, sinks: dict[str, Sink], frames: int, poke: Callable[[], None], steadying: float = 0.0
    ) -> None:
        self._steadier = Steadier(steadying) if steadying else None
        self._sinks, self._limit, self._poke = dict(sinks), frames, poke
        self._loop = asyncio.get_running_loop()
        self._items: deque[OutFrame | AudioCaptured | bool | Fraction | _Remove] = deque()
        self._frames = 0
        self._parts = 0
        self._changed = threading.Condition()
        self._ending = False
        self._results: list[str] = []
        self._finishing: list[threading.Thread] = []  # of sinks that were removed
        self._over = asyncio.Event()
        self._wants_poke = False
        self.error: str | None = None
        self.compute_ms = 0.0  # of the newest frame
        self.parts_dropped = 0
        self._thread = threading.Thread(target=self._run, name=f"sinks-{name}", daemon=True)
        self._thread.start()

    @property
    def room(self) -> int:
        """Frames that may be put without exceeding the bound."""
        with self._changed:
            room = self._limit - self._frames
            self._wants_poke = room <= 0
            return room

    def put(self, frame: OutFrame) -> None:
        """One frame more. The caller has asked for ``room``."""
        with self._changed:
            self._items.append(frame)
            self._frames += 1
            self._changed.notify()

    def put_audio(self, part: AudioCaptured) -> None:
        """Sound; too much of it waiting is dropped and counted."""
        with self._changed:
            if self._parts >= MAX_AUDIO_PARTS:
                self.parts_dropped += 1
                return
            self._items.append(part)
            self._parts += 1
            self._changed.notify()

    def expect_audio(self, expected: bool) -> None:
        """Whether the source has sound; in order with the frames."""
        with self._changed:
            self._items.append(expected)
            self._changed.notify()

    def still(self, until_s: Fraction | None) -> None:
        """The last picture stands until that second of the source, None: of no news; in order with the frames."""
        if until_s is None:
            return
        with self._changed:
            self._items.append(until_s)
            self._changed.notify()

    def remove(self, name: str) -> asyncio.Future[str] | None:
        """Finish one sink, after the frames put so far; what it made, in words. None: there is none of that name.

        Raises SinkError where it cannot be completed, which is nobody else's.
        """
        with self._changed:
            if name not in self._sinks:
                return None
            if self._ending:
                return asyncio.ensure_future(self._with_the_rest())
            removal = _Remove(name, self._loop.create_future())
            self._items.append(removal)
            self._changed.notify()
        return removal.made

    async def _with_the_rest(self) -> str:
        await self._over.wait()
        return ""

    async def finish(self) -> list[str]:
        """Write what waits, complete every sink, end the thread. What was made, in words. ``error`` may be set."""
        with self._changed:
            first, self._ending = not self._ending, True
            self._changed.notify()
        if first:  # no daemon: the process does not end before its files are there
            threading.Thread(target=self._thread.join, name="sinks-end").start()
        await self._over.wait()
        return [result for result in self._results if result]

    # --- in the thread -----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._work()
        finally:
            self._on_loop(self._over.set)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._items or self._ending)
                if not self._items:
                    break
                item = self._items.popleft()
            if isinstance(item, _Remove):
                self._take_out(item)
            elif self.error is None:
                given = self._steadied(item)
                self._each(lambda sink, item=given: _give(sink, item))
            with self._changed:
                self._frames -= isinstance(item, OutFrame)
                self._parts -= isinstance(item, AudioCaptured)
                # Half a queue of room at once: a wake-up of the loop for every frame would cost more.
                poke = self._wants_poke and self._frames <= self._limit // 2
                self._wants_poke = self._wants_poke and not poke
            if poke:
                self._tell()
        for sink in self._sinks.values():
            self._results.append(self._finish(sink))
        for thread in self._finishing:
            thread.join()

    def _steadied(self, item: Any) -> Any:
        if self._steadier is None or not isinstance(item, OutFrame) or item.place is None:
            return item
        try:
            return replace(item, pixels=self._steadier.frame(item.pixels, item.flow, item.place))
        except Exception:
            log.exception("frames are not steadied from here on")
            self._steadier = None
            return item

    def _finish(self, sink: Sink) -> str:
        try:
            return sink.finish()
        except Exception as error:
            self._note(error)
            return ""

    def _take_out(self, removal: _Remove) -> None:
        """Finish it in a thread of its own: a long recording takes a while, and the other sinks go on."""
        thread = threading.Thread(
            target=self._end, args=(self._sinks.pop(removal.name, None), removal), name="sink-ends", daemon=True
        )
        self._finishing = [other for other in self._finishing if other.is_alive()] + [thread]
        thread.start()

    def _end(self, sink: Sink | None, removal: _Remove) -> None:
        try:
            made = sink.finish() if sink is not None else ""
        except Exception as error:
            if not isinstance(error, SinkError):
                log.error("a sink broke", exc_info=error)
            failed = SinkError(one_line(error))
            self._on_loop(lambda: removal.made.done() or removal.made.set_exception(failed))
            return
        self._results.append(made)
        self._on_loop(lambda: removal.made.done() or removal.made.set_result(made))

    def _each(self, work: Callable[[Sink], None]) -> None:
        began = time.perf_counter()
        for sink in list(self._sinks.values()):
            try:
                work(sink)
            except Exception as error:
                self._note(error)
                self._tell()
        self.compute_ms = (time.perf_counter() - began) * 1e3

    def _note(self, error: Exception) -> None:
        if not isinstance(error, SinkError):
            log.error("a sink broke", exc_info=error)
        self.error = self.error or one_line(error)

    def _tell(self) -> None:
        self._on_loop(self._poke)

    def _on_loop(self, work: Callable[[], object]) -> None:
        with suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(work)


def _give(sink: Sink, item: Any) -> None:
    if isinstance(item, OutFrame):
        sink.write(item)
    elif isinstance(item, AudioCaptured):
        sink.audio(item)
    elif isinstance(item, Fraction):
        sink.still(item)
    else:
        sink.expect_audio(item)
