"""How a chunk's time was spent, hop by hop. These figures travel with the chunk; spans and waterfalls are made of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import StrEnum
from typing import TYPE_CHECKING

from pydantic import Field

from shared.contracts.refs import Wire
from shared.contracts.unchecked import unchecked

if TYPE_CHECKING:
    from shared.contracts.events import ChunkStamp

CAPTURE, INGEST, SCHEDULER, STAGE, EGRESS = "capture", "ingest", "scheduler", "stage", "egress"
NS_PER_MS = 1e6


class StageTiming(Wire):
    """How long a hop took: ``queue_ms`` waiting here, ``compute_ms`` working, from ``begin_ns`` on (0: not known).

    ``transfer_ms``: from the end of the hop before to when all that this one needs was here; above 0 only where the clocks
    of both hosts agree. So a hop's time is transfer, queue, compute, and nothing lies between it and the hop before.
    ``instance`` did it; of a stage, ``stage`` says which of ``pipeline`` (−1: none).
    """

    hop: str
    queue_ms: float
    compute_ms: float
    begin_ns: int = 0
    transfer_ms: float = 0.0
    instance: str = ""
    pipeline: str = ""
    stage: int = -1

    @property
    def end_ns(self) -> int:
        """When its work was done; 0 when that is not known."""
        return self.begin_ns + round(self.compute_ms * NS_PER_MS) if self.begin_ns else 0

    @property
    def arrived_ns(self) -> int:
        """When it could have begun."""
        return self.begin_ns - round(self.queue_ms * NS_PER_MS)


class Verdict(StrEnum):
    """What became of a chunk, by the worst that became of one of its frames."""

    ON_TIME = "on_time"
    LATE = "late"
    SKIPPED = "skipped"
    DROPPED = "dropped"
    FAILED = "failed"  # its stream failed


class ChunkEnd(Wire):
    """One chunk that has its verdict. ``egress``: it waited for its playout, and then was shown (or was waited for).

    ``captured_ns`` is its first frame's capture, 0 when egress knew it by its number alone; ``reason`` is "service:reason"
    of a frame that was dropped.
    """

    chunk: int
    verdict: Verdict
    closed_ns: int
    captured_ns: int = 0
    reason: str = ""
    trace: str = ""
    egress: StageTiming = Field(default=StageTiming(hop=EGRESS, queue_ms=0.0, compute_ms=0.0))


def timing_of(
    hop: str, after_ns: int, arrived_ns: int, begin_ns: int, compute_ms: float = 0.0, **where: str | int
) -> StageTiming:
    """A hop that had everything at ``arrived_ns`` and began at ``begin_ns``; the hop before ended at ``after_ns`` (or 0)."""
    return unchecked(
        StageTiming,
        {
            "hop": hop,
            "queue_ms": max(0, begin_ns - arrived_ns) / NS_PER_MS,
            "compute_ms": float(compute_ms),
            "begin_ns": begin_ns,
            "transfer_ms": max(0, arrived_ns - after_ns) / NS_PER_MS if after_ns else 0.0,
            "instance": "",
            "pipeline": "",
            "stage": -1,
            **where,
        },
    )


def ended_ns(stamp: ChunkStamp, timings: Sequence[StageTiming]) -> int:
    """When the newest of a chunk's hops ended; ingest's when no other has a time yet."""
    return (timings[-1].end_ns if timings else 0) or stamp.published_ns


def ingest_timings(stamp: ChunkStamp) -> tuple[StageTiming, ...]:
    """The hops at ingest, which the stamp tells of: the frames were captured, the chunk waited for a credit, was made."""
    if not stamp.frames or not stamp.published_ns:
        return ()
    first, last = stamp.frames[0].captured_ns, stamp.frames[-1].captured_ns
    begun = max(stamp.begun_ns or last, last)
    filled = max(0, last - first) / NS_PER_MS
    made = max(0, stamp.published_ns - begun) / NS_PER_MS
    return (
        StageTiming(hop=CAPTURE, queue_ms=0.0, compute_ms=filled, begin_ns=first),
        StageTiming(hop=INGEST, queue_ms=(begun - last) / NS_PER_MS, compute_ms=made, begin_ns=begun),
    )


def way_of(stamp: ChunkStamp, timings: Iterable[StageTiming], end: ChunkEnd | None = None) -> tuple[StageTiming, ...]:
    """All hops of a chunk in their order."""
    return (*ingest_timings(stamp), *timings, *(() if end is None else (end.egress,)))
