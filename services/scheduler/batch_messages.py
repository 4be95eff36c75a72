"""What the scheduler tells stage 0, made from what was checked when it came: a decision is not to cost more than it decides."""

from __future__ import annotations

from collections.abc import Sequence

from services.scheduler.works import Work
from shared.contracts.events import BatchEntry, StageBatch
from shared.contracts.unchecked import unchecked


def stage_batch(
    pipeline: str, term: int, generation: int, seq: int, works: Sequence[Work], height: int, width: int, now_ns: int
) -> StageBatch:
    """The message of a batch. Raises ValueError for a work whose item is not bound yet."""
    return unchecked(
        StageBatch,
        {
            "kind": "stage_batch",
            "pipeline": pipeline,
            "term": term,
            "generation": generation,
            "seq": seq,
            "entries": tuple([_entry(work) for work in works]),
            "height": height,
            "width": width,
            "activations": None,
            "scheduled_ns": now_ns,
            "compute_ms": (),
            "timings": (),
        },
    )


def _entry(work: Work) -> BatchEntry:
    if work.item is None:
        raise ValueError("a work without an item cannot be sent")
    # Without a source there are no latents: what a chunk carries is an empty tensor.
    inputs = tuple([ref for ref in work.inputs if 0 not in ref.shape])
    return unchecked(
        BatchEntry,
        {
            "item": work.item,
            "stamps": work.stamps,
            "inputs": inputs,
            "timings": work.timings,
            "arrived": work.arrived,
        },
    )
