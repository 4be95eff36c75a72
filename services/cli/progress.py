"""Progress on stderr: a bar on a terminal, a line every few seconds elsewhere, nothing when asked to be quiet."""

from __future__ import annotations

import sys
import time
from collections import deque
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from shared.contracts.events import ChunkClosed

PLAIN_EVERY_S = 5.0
RATE_WINDOW = 40


class Progress:
    """fps, latency and time left of one run. ``total`` is the expected frame count, if known."""

    def __init__(self, total: int | None, quiet: bool = False) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._quiet = quiet
        self._total = total
        self._task: TaskID | None = None
        self._bar: Bar | None = None
        self._recent: deque[tuple[float, int]] = deque(maxlen=RATE_WINDOW)
        self._plain_at = 0.0
        self._shown = -1

    def __enter__(self) -> Progress:
        if not self._quiet and sys.stderr.isatty():
            self._bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.completed}/{task.total} frames"),
                TextColumn("{task.fields[figures]}"),
                TimeRemainingColumn(),
                console=self._console,
                transient=False,
            )
            self._task = self._bar.add_task("starting", total=self._total, figures="")
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def note(self, text: str) -> None:
        """One line about what is going on."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, description=text)
        elif not self._quiet:
            self._console.print(text, soft_wrap=True)

    def show(self, closed: ChunkClosed | None) -> None:
        """The newest verdicts."""
        if closed is None or closed.totals.closed in (0, self._shown):
            return
        self._shown = done = closed.totals.closed
        now = time.monotonic()
        self._recent.append((now, done))
        first_at, first_done = self._recent[0]
        fps = (done - first_done) / (now - first_at) if now > first_at else 0.0
        figures = f"{fps:.1f} fps, latency {closed.latency_ms:.0f} ms"
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, description="restyling", completed=done, figures=figures)
        elif not self._quiet and now - self._plain_at >= PLAIN_EVERY_S:
            self._plain_at = now
            left = ""
            if self._total and fps > 0:
                left = f", {max(0.0, (self._total - done) / fps):.0f} s left"
            self._console.print(f"{done}/{self._total or '?'} frames, {figures}{left}", soft_wrap=True)
