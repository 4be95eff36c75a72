"""Which job each of a device's threads runs next, where it has more than one. Pure.

Where the device is the host's cores, two threads ("hands") share its work: one has the stages and all that is rare, one
the autoencoder. Small forwards gain nothing from a second thread, so two of them at once is what fills two cores.
"""

from __future__ import annotations

from typing import Generic, TypeVar

from services.worker.core import ALL_RANKS, Job, JobQueue, Rank

T = TypeVar("T")

TWO_HANDS = ((Rank.CONTROL, Rank.STAGE, Rank.TEXT), (Rank.DECODE, Rank.ENCODE))


class Hands(Generic[T]):
    """Each hand has its ranks. A job that does not share runs while the other hands rest.

    As long as such a job is at the front of a hand, the others begin nothing: it runs as soon as they are through. Of two
    such jobs the first hand's goes first.
    """

    def __init__(self, jobs: JobQueue[T], ranks: tuple[tuple[Rank, ...], ...] = (ALL_RANKS,)) -> None:
        self._jobs, self._ranks = jobs, ranks
        self._running: list[Job[T] | None] = [None] * len(ranks)

    @property
    def count(self) -> int:
        """How many."""
        return len(self._ranks)

    def begin(self, hand: int) -> Job[T] | None:
        """The job that this hand runs now, until :meth:`end`; None: there is none, or it has to wait for another hand."""
        job = self._jobs.peek(self._ranks[hand])
        if job is None:
            return None
        for other, ranks in enumerate(self._ranks):
            if other == hand:
                continue
            running, waiting = self._running[other], self._jobs.peek(ranks)
            if running is not None and not (running.shares and job.shares):
                return None
            if waiting is not None and not waiting.shares and (job.shares or other < hand):
                return None
        self._running[hand] = job
        return self._jobs.pick(self._ranks[hand])

    def end(self, hand: int) -> None:
        """The hand's job is done."""
        self._running[hand] = None
