"""How long work waited here, as its chunks' timings say it. Pure; time is passed in (UNIX ns)."""

from __future__ import annotations

from collections.abc import Mapping

from services.scheduler.works import Timings, Work
from shared.contracts.events import BatchDone, StageTiming
from shared.contracts.timing import SCHEDULER, STAGE, ended_ns, timing_of


def waited(
    work: Work, arrived_ns: Mapping[int, int], now_ns: int, pipeline: str
) -> tuple[Timings, tuple[Timings, ...]]:
    """(timings, arrived) of work that is sent now. ``arrived_ns``: when each chunk that is not in a block yet came.

    Chunks that are joined into one block of T > 1 have waited for each other, each for another time.
    """
    if work.item is None and work.arrived:
        each = zip(work.stamps, work.arrived, strict=True)
        return work.timings, tuple(
            (*own, timing_of(SCHEDULER, ended_ns(stamp, own), came, now_ns, pipeline=pipeline))
            for stamp, own in each
            for came in (arrived_ns.get(stamp.chunk, work.ready_ns),)
        )
    after_ns = ended_ns(work.stamps[-1], work.timings)
    mine = timing_of(SCHEDULER, after_ns, work.ready_ns, now_ns, pipeline=pipeline)
    return (*work.timings, mine), work.arrived


def passed(done: BatchDone) -> Timings:
    """What a batch's stages took; summed up where they did not say it one by one."""
    return done.timings or (StageTiming(hop=STAGE, queue_ms=0.0, compute_ms=sum(done.stage_ms)),)
