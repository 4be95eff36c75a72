"""The thread that opens, decodes, fits and paces one source."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np

from services.ingest.feed import Feed
from services.ingest.fit import ShapeError
from services.ingest.pacing import LivePacer, Pace
from services.ingest.sources.port import Picture, Sound, Source, SourceError
from shared.media.errors import one_line

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Shot:
    """A picture with its capture time: when it is due (live), or when it was read (lossless). UNIX nanoseconds."""

    picture: Picture
    captured_ns: int


@dataclass(frozen=True, slots=True)
class Behind:
    """A picture that was read too late to be sent."""


@dataclass(frozen=True, slots=True)
class End:
    """The source gives nothing more; ``error`` is one line when it broke."""

    error: str | None = None


Item = Shot | Sound | Behind | End


class Reader:
    """Reads one source in its own thread. ``opened`` resolves to the source, or raises SourceError.

    ``behind_ns``: how late a live frame may be read; None reads as fast as the feed takes. ``skip`` pictures at the
    start were captured by a predecessor and are read over.
    """

    def __init__(
        self,
        name: str,
        open_it: Callable[[], Source],
        feed: Feed[Item],
        *,
        behind_ns: int | None,
        skip: int = 0,
        preview: Callable[[np.ndarray, int], None] = lambda pixels, captured_ns: None,
    ) -> None:
        self._preview = preview
        self._open, self._feed, self._behind_ns, self._skip = open_it, feed, behind_ns, skip
        self.opened: Future[Source] = Future()
        self._thread = threading.Thread(target=self._run, name=f"reader-{name}", daemon=True)

    def start(self) -> None:
        """Begin to open."""
        self._thread.start()

    async def stop(self) -> None:
        """End the thread; it closes its source."""
        self._feed.stop()
        if self._thread.is_alive():
            await asyncio.to_thread(self._thread.join, 5.0)

    def _run(self) -> None:
        # Whoever waits may give up while the source opens: from here on that cannot cancel what is set below.
        if not self.opened.set_running_or_notify_cancel():
            return
        try:
            source = self._open()
        except SourceError as error:
            self.opened.set_exception(error)
            return
        except Exception as error:
            log.exception("a source could not be opened")
            self.opened.set_exception(SourceError(f"the source could not be opened ({one_line(error)})"))
            return
        self.opened.set_result(source)
        error_line: str | None = None
        try:
            self._read(source)
        except SourceError as error:
            error_line = str(error)
        except ShapeError as error:
            error_line = f"the source cannot be shown: {error}"
        except Exception as error:
            log.exception("a source could not be read on")
            error_line = f"the source could not be read on ({one_line(error)})"
        finally:
            source.close()
        self._feed.put(End(error_line))

    def _read(self, source: Source) -> None:
        if self._feed.stopped:
            return
        pacer = None if self._behind_ns is None else LivePacer(source.time_base, self._behind_ns)
        holds = self._feed.holds
        for item in source.read():
            if pacer is not None and holds != self._feed.holds:
                holds = self._feed.holds
                pacer.restart()
            if isinstance(item, Sound):
                if not self._feed.put(item):
                    return
            elif self._skip > 0:
                self._skip -= 1
            elif not self._deliver(item, pacer):
                return
            if self._feed.stopped:
                return

    def _deliver(self, picture: Picture, pacer: LivePacer | None) -> bool:
        now = time.time_ns()
        self._preview(picture.pixels, picture.captured_ns or now)
        if picture.captured_ns and self._behind_ns is not None:  # it comes as it is captured
            late = now - picture.captured_ns > self._behind_ns
            return self._feed.put(Behind() if late else Shot(picture, picture.captured_ns))
        if pacer is None:
            return self._feed.put(Shot(picture, now))
        pace, due = pacer.due(picture.pts, now)
        if pace is Pace.DROP:
            return self._feed.put(Behind())
        if due > now and not self._feed.wait((due - now) / 1e9):
            return False
        return self._feed.put(Shot(picture, due))
