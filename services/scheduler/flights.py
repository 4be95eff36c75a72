"""Batches in flight: those that should have been reported by now. Pure; time is passed in (ns)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from services.scheduler.works import Work

Shape = tuple[int, int, int, int, int]
"""Frames, context frames, height, width and items of a forward: what a compiler makes code for."""


PATIENCE = 6


@dataclass(slots=True)
class Flight:
    """A batch that stage 0 has been given and the last stage has not reported. ``met``: one of its shape has been."""

    works: tuple[Work, ...]
    sent_ns: int
    units: int  # latent tokens of one item's forward
    live: bool
    shape: Shape
    met: bool


def overdue(flights: Mapping[int, Flight], now_ns: int, live_ns: int, lossless_ns: int) -> int | None:
    """The number of the oldest batch that is out for longer than it may be, or None.

    Live ones may ``live_ns``, lossless ones ``lossless_ns``. The first of its shape, for which a worker may have to compile,
    may PATIENCE times as long, and whatever is behind it: a rebuild would meet the same again.
    """
    patience = 1
    for number, flight in flights.items():
        patience = patience if flight.met else PATIENCE
        limit_ns = min(live_ns * patience, lossless_ns) if flight.live else lossless_ns
        if now_ns - flight.sent_ns > limit_ns:
            return number
    return None
