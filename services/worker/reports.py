"""What a worker tells of its chunks beside its results: how long they took, as figure, metric and span, and those it drops."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence

from services.worker.device_thread import Outcome
from services.worker.fencing import StaleError
from services.worker.runtime import Runtime
from shared.contracts import subjects
from shared.contracts.events import BatchEntry, ChunkDropped, ChunkStamp, StageTiming
from shared.contracts.timing import NS_PER_MS, timing_of
from shared.lifecycle import Context
from shared.logs import about
from shared.telemetry import names
from shared.telemetry.hops import record_hop

log = logging.getLogger(__name__)


class Reports:
    """One worker's. ``count`` is told of each chunk that is dropped."""

    def __init__(self, context: Context, runtime: Runtime, count: Callable[[str], None]) -> None:
        self._context, self._runtime, self._count = context, runtime, count
        self._tracer = context.telemetry.tracer
        self._compute = context.metrics.histogram(names.ROLE_COMPUTE)
        self.role_ms: dict[str, float] = {}

    def timing(self, hop: str, outcome: Outcome, after_ns: int) -> StageTiming:
        """How long a job took; ``after_ns``: when the hop before ended."""
        place = self._runtime.place
        where = {"pipeline": place.pipeline, "stage": place.stage} if hop == names.STAGE else {}
        arrived_ns = outcome.started_ns - round(outcome.queue_ms * NS_PER_MS)
        return timing_of(
            hop,
            after_ns,
            arrived_ns,
            outcome.started_ns,
            outcome.compute_ms,
            instance=self._context.instance,
            **where,
        )

    def took(self, hop: str, stamps: Sequence[ChunkStamp], outcome: Outcome, after_ns: int) -> StageTiming:
        """A job ended: each of its chunks has the whole time of it."""
        timing = self.timing(hop, outcome, after_ns)
        if outcome.error is None:
            self.role_ms[hop] = outcome.compute_ms
        for stamp in stamps:
            record_hop(self._tracer, stamp, timing, outcome.error)
            if outcome.error is None:
                self._compute.record(outcome.compute_ms / 1e3, stamp.trace, hop=hop)
        return timing

    def batch_took(self, entries: Iterable[BatchEntry], outcome: Outcome, after_ns: int) -> StageTiming:
        """The same of a stage's batch, whose items are at steps of their own."""
        entries = tuple(entries)
        timing = self.timing(names.STAGE, outcome, after_ns)
        if outcome.error is None:
            self.role_ms[names.STAGE] = outcome.compute_ms
        for entry in entries:
            told = {names.STEP: entry.item.step, names.BATCH_COUNT: len(entries)}
            for stamp in entry.stamps:
                record_hop(self._tracer, stamp, timing, outcome.error, extra=told)
                if outcome.error is None:
                    self._compute.record(outcome.compute_ms / 1e3, stamp.trace, hop=names.STAGE)
        return timing

    async def dropped_by(self, outcome: Outcome, stamp: ChunkStamp, timings: tuple[StageTiming, ...] = ()) -> None:
        """A job failed, or came too late to be begun."""
        if isinstance(outcome.error, StaleError):
            await self.drop(stamp, "stale", timings)
            return
        with about(stamp):
            log.error("chunk %d of %s failed", stamp.chunk, stamp.stream, exc_info=outcome.error)
        await self.drop(stamp, "error", timings)

    async def drop(self, stamp: ChunkStamp, reason: str, timings: tuple[StageTiming, ...] = ()) -> None:
        """Give a chunk up. ``reason`` is "word" or "word: detail"; ``timings`` are of the hops before."""
        self._count("dropped")
        short, _, detail = reason.partition(":")
        if detail:
            with about(stamp):
                log.warning("chunk %d of %s dropped, %s", stamp.chunk, stamp.stream, reason)
        dropped = ChunkDropped(stamp=stamp, service="worker", reason=short, timings=timings)
        await self._context.bus.publish(subjects.stream(stamp.stream, "frames"), dropped)
