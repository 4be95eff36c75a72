"""The one thread that drives the device. The event loop hands it jobs and gets results back; it never touches messages.

On a GPU it runs ahead of the device, by at most :data:`MAX_AHEAD` jobs per lane; one more thread per lane waits for the ends
of jobs and hands their results on in the lane's order (:mod:`services.worker.timeline`). Where the device is the host's cores
there may be two such threads, or "hands" (:mod:`services.worker.hands`).
"""

from __future__ import annotations

import asyncio
import contextvars
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from services.worker.core import Job, JobQueue, Rank
from services.worker.hands import Hands
from services.worker.timeline import HostTimeline, Mark, Timeline, lane_of

MAX_AHEAD = 4
"""Jobs of a lane that may be enqueued on the device and not done: enough to keep it busy, few enough to stay in order."""


class QueueFullError(RuntimeError):
    """The device has more waiting than it may hold; the job was turned away."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a job came to. ``value`` is its result, ``error`` what it raised; times in UNIX ns and milliseconds."""

    value: Any
    error: BaseException | None
    started_ns: int
    queue_ms: float
    compute_ms: float


@dataclass(frozen=True, slots=True)
class _DeviceWork:
    run: Callable[[], Any]
    done: Callable[[Outcome], None]
    context: contextvars.Context


@dataclass(frozen=True, slots=True)
class _Enqueued:
    """A job whose device work is under way."""

    job: Job[_DeviceWork]
    value: Any
    mark: Mark


class DeviceThread:
    """Runs jobs one at a time, or with more ``hands`` as :class:`Hands` lets them, in the order :class:`JobQueue` picks them.

    ``prepare`` runs first in each thread and returns the device's timeline, or None for a CPU's. ``lost`` is told, after its
    job, of an error that came from the device itself: nothing that it has done since can be relied upon.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        prepare: Callable[[], Timeline | None],
        size: int = 256,
        lost: Callable[[Exception], None] | None = None,
        hands: int = 1,
    ) -> None:
        self._loop = loop
        self._prepare = prepare
        self._lost = lost
        self._lock = threading.Lock()
        self._jobs: JobQueue[_DeviceWork] = JobQueue(size)
        self._hands = Hands(self._jobs, hands)
        self._wake = threading.Condition()
        self._stopping = False
        self._busy_s = self._taken_s = 0.0
        self._ahead: dict[str, queue.Queue[_Enqueued | None]] = {}
        self._threads = [
            threading.Thread(target=self._main, args=(hand,), name=f"device-{hand}", daemon=True)
            for hand in range(self._hands.count)
        ]

    def start(self) -> None:
        """Start the threads."""
        for thread in self._threads:
            thread.start()

    @property
    def refused(self) -> int:
        """Jobs turned away because a queue was full."""
        return self._jobs.refused

    @property
    def waiting(self) -> int:
        """Jobs not started yet."""
        return len(self._jobs)

    def submit(
        self,
        rank: Rank,
        run: Callable[[], Any],
        done: Callable[[Outcome], None],
        deadline_ns: int = 0,
        shares: bool = False,
    ) -> None:
        """Queue ``run``; ``done`` is called on the event loop with its outcome, in the caller's context.

        ``shares``: beside other hands' sharing jobs.

        Raises QueueFullError.
        """
        job = Job(rank, deadline_ns, time.time_ns(), _DeviceWork(run, done, contextvars.copy_context()), shares)
        with self._wake:
            if not self._jobs.put(job):
                raise QueueFullError(f"{rank.name.lower()} queue is full")
            self._wake.notify_all()

    async def call(self, rank: Rank, run: Callable[[], Any]) -> Any:
        """Queue ``run`` and await its value; what it raises is raised here."""
        future: asyncio.Future[Any] = self._loop.create_future()

        def done(outcome: Outcome) -> None:
            if future.cancelled():
                return
            if outcome.error is not None:
                future.set_exception(outcome.error)
            else:
                future.set_result(outcome.value)

        self.submit(rank, run, done)
        return await future

    def forget(self, *ranks: Rank) -> int:
        """Give up what waits of these ranks; how many jobs that were. Nobody is told: only for jobs that none awaits."""
        with self._wake:
            self._wake.notify_all()  # what was given up may have kept other hands waiting
            return self._jobs.forget(*ranks)

    def take_busy_s(self) -> float:
        """Seconds spent computing since the last call."""
        before, self._taken_s = self._taken_s, self.busy_s
        return self._taken_s - before

    @property
    def busy_s(self) -> float:
        """Seconds spent computing so far."""
        with self._lock:
            return self._busy_s

    def stop(self, timeout_s: float = 5.0) -> None:
        """Finish the job under way, drop the rest, end the thread. Idempotent."""
        with self._wake:
            self._stopping = True
            self._wake.notify_all()
        for thread in self._threads:
            if thread.is_alive():
                thread.join(timeout_s)

    def _main(self, hand: int) -> None:
        timeline: Timeline = self._prepare() or HostTimeline()
        finishers: list[threading.Thread] = []
        for lane in timeline.lanes:
            self._ahead[lane] = queue.Queue(MAX_AHEAD)
            finisher = threading.Thread(
                target=self._finish, args=(self._ahead[lane],), name=f"{lane}-ends", daemon=True
            )
            finisher.start()
            finishers.append(finisher)
        while (job := self._next(hand)) is not None:
            self._run(job, timeline)
            with self._wake:
                self._hands.end(hand)
                self._wake.notify_all()
        for ends in self._ahead.values():
            ends.put(None)
        for finisher in finishers:
            finisher.join()

    def _run(self, job: Job[_DeviceWork], timeline: Timeline) -> None:
        started_ns, begin = time.time_ns(), time.perf_counter()
        lane = lane_of(job.rank)
        try:
            value, mark = timeline.mark(lane, job.work.run)
        except Exception as error:
            self._hand_on(job, None, error, started_ns, (time.perf_counter() - begin) * 1e3)
            if self._lost is not None and timeline.is_lost(
                error
            ):  # an earlier job's kernel failed while this one was made
                self._lost(error)
            return
        if mark is None:
            self._hand_on(job, value, None, started_ns, (time.perf_counter() - begin) * 1e3)
        else:
            self._ahead[lane].put(_Enqueued(job, value, mark))  # waits while the device is far behind

    def _finish(self, ends: queue.Queue[_Enqueued | None]) -> None:
        """Wait for one lane's jobs, in order."""
        while (enqueued := ends.get()) is not None:
            try:
                took_ms = enqueued.mark.wait()
            except Exception as error:  # a kernel failed: everything the device has done since is in doubt
                self._hand_on(enqueued.job, None, error, time.time_ns(), 0.0)
                if self._lost is not None:
                    self._lost(error)
                continue
            self._hand_on(enqueued.job, enqueued.value, None, time.time_ns() - int(took_ms * 1e6), took_ms)

    def _hand_on(
        self, job: Job[_DeviceWork], value: Any, error: Exception | None, started_ns: int, took_ms: float
    ) -> None:
        with self._lock:  # one thread per lane comes here
            self._busy_s += took_ms / 1e3
        outcome = Outcome(value, error, started_ns, (started_ns - job.queued_ns) / 1e6, took_ms)
        try:
            self._loop.call_soon_threadsafe(job.work.done, outcome, context=job.work.context)
        except RuntimeError:  # the loop has closed: nobody is left to tell
            self._stopping = True

    def _next(self, hand: int) -> Job[_DeviceWork] | None:
        with self._wake:
            while True:
                if self._stopping:
                    return None
                job = self._hands.begin(hand)
                if job is not None:
                    self._wake.notify_all()  # others may help, now that this one is at work
                    return job
                self._wake.wait()
