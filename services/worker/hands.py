"""Which job each of a device's threads runs next, where it has more than one. Pure.

Where the device is the host's cores, a second thread ("hand") helps out with small forwards: they gain nothing from more
threads, so two of them at once is what fills two cores.
"""

from __future__ import annotations

from typing import Generic, TypeVar

from services.worker.core import Job, JobQueue, Rank

T = TypeVar("T")

CODEC = (Rank.DECODE, Rank.ENCODE)
BLOCKS = (Rank.CONTROL, Rank.STAGE, Rank.TEXT)


class Hands(Generic[T]):
    """The first hand runs whatever is most urgent; the others help while it is at work.

    A job that does not share runs alone; as long as one is the most urgent, nothing else begins. Sharing jobs run beside
    each other only if one is of the autoencoder and one of the blocks: each of the two has caches that bear one at a time.
    """

    def __init__(self, jobs: JobQueue[T], count: int = 1) -> None:
        self._jobs = jobs
        self._running: list[Job[T] | None] = [None] * count

    @property
    def count(self) -> int:
        """How many."""
        return len(self._running)

    def begin(self, hand: int) -> Job[T] | None:
        """The job that this hand runs now, until :meth:`end`; None: there is none for it yet."""
        running = [job for job in self._running if job is not None]
        if not running:
            ranks = (*BLOCKS, *CODEC)
            if hand:
                return None  # the first hand's
        else:
            first = self._jobs.peek()
            if first is None or not all(job.shares for job in (first, *running)):
                return None
            ranks = tuple(
                rank for side in (CODEC, BLOCKS) if not any(job.rank in side for job in running) for rank in side
            )
        job = self._jobs.peek(ranks)
        if job is None or (running and not job.shares):
            return None
        self._running[hand] = job
        return self._jobs.pick(ranks)

    def end(self, hand: int) -> None:
        """The hand's job is done."""
        self._running[hand] = None
