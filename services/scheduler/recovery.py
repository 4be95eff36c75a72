"""What becomes of a stream whose worker is lost: who recovers, where to, and with what. Pure; time is passed in.

A live stream recovers: it gets a new epoch at once, so that nothing of the lost placement counts any more, its source is held,
and it goes on with a new first block as soon as a pipeline has room for it: its own when the worker is back, empty, or
another. So it does when its egress is lost: that one opens the sinks again once it is back. A lossless stream has lost
frames that nobody has any more: it fails.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum

from services.scheduler.fleet import Pipeline
from services.scheduler.placement import choose_pipeline
from services.scheduler.records import Phase, StreamRecord
from services.scheduler.stream_queue import StreamQueue
from shared.contracts.commands import Mode
from shared.contracts.order import OrderGate
from shared.engine.plan.stream_plan import StreamPlan


class Fate(StrEnum):
    """What the loss of an instance costs a stream."""

    NOTHING = "nothing"  # it held none of its state
    RECOVERS = "recovers"
    RECOVERING = "recovering"  # it does already: the try under way, if it is for this instance, has failed
    CLOSES = "closes"  # it is being stopped: what was under way is given up, and it ends as it was told to
    FAILS = "fails"


def fate(record: StreamRecord, instance: str) -> Fate:
    """What becomes of a stream when ``instance`` is lost. What workers and egress hold can be made anew."""
    if instance not in record.holders():
        return Fate.NOTHING
    if instance not in record.workers and (instance != record.egress or record.phase is Phase.STOPPING):
        return Fate.FAILS  # what is being stopped is closed by an egress that was not told of it yet
    if record.phase is Phase.RECOVERING:
        return Fate.RECOVERING
    if record.spec.mode is not Mode.LIVE or record.failure is not None:
        return Fate.FAILS
    return {Phase.RUNNING: Fate.RECOVERS, Phase.STOPPING: Fate.CLOSES}.get(record.phase, Fate.FAILS)


@dataclass(slots=True)
class Recovery:
    """One stream on its way back. ``queue`` is what the scheduler held of it: its settings and commands live on."""

    queue: StreamQueue
    reason: str
    since: float
    pipeline: str
    error: str = ""  # why the newest try failed

    def expired(self, now: float, within_s: float) -> str | None:
        """The line to fail with when it has taken too long, or None."""
        if now - self.since <= within_s:
            return None
        return f"{self.reason}, and in {within_s:g} s {self.error or 'no pipeline had room for the stream'}"


def choose(
    record: StreamRecord,
    pipelines: Iterable[Pipeline],
    records: Mapping[str, StreamRecord],
    max_streams: int,
    loads: Mapping[str, float],
) -> Pipeline | None:
    """Where a stream goes on: its own pipeline if that is whole, else the one with the least load that has room.

    ``loads`` are admission's: the share of each pipeline that is promised. One that it does not know yet has none.
    """
    fitting = [pipeline for pipeline in pipelines if pipeline.model == record.spec.model]
    others = [other for other in records.values() if other is not record and other.phase is not Phase.ENDED]
    streams = {pipeline.name: sum(other.pipeline == pipeline.name for other in others) for pipeline in fitting}
    room = {pipeline.name: pipeline for pipeline in fitting if streams[pipeline.name] < max_streams}
    if record.pipeline in room:
        return room[record.pipeline]
    # While nothing is priced, all loads are 0: then the fewest streams decide.
    chosen = choose_pipeline({name: (loads.get(name, 0.0), streams[name]) for name in room})
    return None if chosen is None else room[chosen]


def renewed(kept: StreamQueue, epoch: int, prompt_version: int) -> StreamQueue:
    """A queue without any state of the lost placement: same settings, same commands that wait, a new first block."""
    return replace(
        kept,
        epoch=epoch,
        plan=StreamPlan.for_model(kept.stream, epoch, kept.model),
        settings=replace(kept.settings, prompt_version=prompt_version),
        shown=0,
        fade=None,
        recache=False,
        waiting=deque(),
        later={},
        gate=OrderGate(),
        arrived_ns={},
    )
