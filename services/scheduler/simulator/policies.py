"""Other ways to make batches, to compare with: everything but the choice is the scheduler's own core.

* ``slack``: the scheduler as it is;
* ``edf``: earliest deadline first, batches as large as they may be, what can no longer make it is dropped;
* ``fifo``: what has waited longest goes first, alone with the other steps of its stream (as the public code serves one stream);
  nothing is dropped before its step 0;
* ``maxbatch``: what has waited longest goes first, batches as large as they may be, nothing is dropped before its step 0.

Only ``slack`` has admission and the ladder: the others take whoever comes.
"""

from __future__ import annotations

from enum import StrEnum

from services.scheduler.core import Decisions, PipelineCore
from services.scheduler.stream_queue import StreamQueue, Work


class Policy(StrEnum):
    """How batches are made."""

    SLACK = "slack"
    EDF = "edf"
    FIFO = "fifo"
    MAXBATCH = "maxbatch"

    @property
    def core(self) -> type[PipelineCore]:
        """The pipeline core that makes batches this way."""
        return _CORES[self]

    @property
    def governed(self) -> bool:
        """Whether admission and the ladder are at work."""
        return self is Policy.SLACK


class _OrderedCore(PipelineCore):
    """Batches in a fixed order, filled without a look at deadlines."""

    def _first(self, work: Work) -> tuple[int, str]:
        return work.ready_ns, work.stream

    def _together(self, first: Work, other: Work) -> bool:
        return self._bucket(first) == self._bucket(other)

    def schedule(self, now_ns: int) -> Decisions:
        decisions = Decisions()
        for queue in self.streams.values():
            self._drop_stale(queue, now_ns, decisions)
        while len(self.in_flight) <= self.stages and now_ns >= self.dispatch_at_ns():
            order = sorted(self._candidates(), key=self._first)
            members = [work for work in order if self._together(order[0], work)][: self.max_batch]
            if not members:
                break
            decisions.batches.append(self._send(members, now_ns, decisions))
        return decisions


class _MaxBatchCore(_OrderedCore):
    def _drop_stale(self, queue: StreamQueue, now_ns: int, decisions: Decisions) -> None:
        """Nothing is dropped."""


class _FifoCore(_MaxBatchCore):
    def _together(self, first: Work, other: Work) -> bool:
        return first.stream == other.stream and super()._together(first, other)


class _EdfCore(_OrderedCore):
    def _first(self, work: Work) -> tuple[int, str]:
        return work.deadline_ns, work.stream


_CORES: dict[Policy, type[PipelineCore]] = {
    Policy.SLACK: PipelineCore,
    Policy.EDF: _EdfCore,
    Policy.FIFO: _FifoCore,
    Policy.MAXBATCH: _MaxBatchCore,
}
