"""How a stream's sinks fare, gathered once a second for whoever watches."""

from __future__ import annotations

import time
from collections.abc import Callable

from services.egress.live.desk import LiveDesk
from services.egress.rtc.viewers import WhepDesk
from shared.contracts.sinks import SinkFigures

EVERY_S = 1.0

Due = Callable[[], tuple[SinkFigures, ...] | None]
"""The figures; None: they were told a moment ago."""


def nothing_told() -> tuple[SinkFigures, ...] | None:
    """Of a stream whose sinks are not known yet."""
    return None


class SinkReport:
    """``shown`` counts the frames that went to every sink so far."""

    def __init__(self, live: LiveDesk, viewers: WhepDesk, shown: Callable[[], int]) -> None:
        self._live, self._viewers, self._shown = live, viewers, shown
        self._told_at = -EVERY_S

    def due(self) -> tuple[SinkFigures, ...] | None:
        """Every sink's figures, at most once a second."""
        now = time.monotonic()
        if now - self._told_at < EVERY_S:
            return None
        self._told_at = now
        return tuple(self.now())

    def now(self) -> list[SinkFigures]:
        """Every sink's figures. What comes with the stream's frames (files from its start, null) has had all of them."""
        found = self._live.sink.figures()
        for name, kind in self._live.others.items():
            if kind == "whep":
                fanout = self._viewers.fanout
                found.append(SinkFigures(id=name, sink_kind=kind, frames=fanout.encoded, viewers=len(fanout)))
            else:
                found.append(SinkFigures(id=name, sink_kind=kind, frames=self._shown()))
        return found
