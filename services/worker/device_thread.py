"""The one thread that drives the device. The event loop hands it jobs and gets results back; it never touches messages."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from services.worker.core import Job, JobQueue, Rank


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


class DeviceThread:
    """Runs jobs one at a time, in the order :class:`JobQueue` picks them."""

    def __init__(self, loop: asyncio.AbstractEventLoop, prepare: Callable[[], None], size: int = 256) -> None:
        self._loop = loop
        self._prepare = prepare
        self._jobs: JobQueue[_DeviceWork] = JobQueue(size)
        self._wake = threading.Condition()
        self._stopping = False
        self._busy_s = 0.0
        self._thread = threading.Thread(target=self._main, name="device", daemon=True)

    def start(self) -> None:
        """Start the thread; ``prepare`` runs first in it (thread counts, device choice)."""
        self._thread.start()

    @property
    def refused(self) -> int:
        """Jobs turned away because a queue was full."""
        return self._jobs.refused

    @property
    def waiting(self) -> int:
        """Jobs not started yet."""
        return len(self._jobs)

    def submit(self, rank: Rank, run: Callable[[], Any], done: Callable[[Outcome], None], deadline_ns: int = 0) -> None:
        """Queue ``run``; ``done`` is called on the event loop with its outcome. Raises QueueFullError."""
        job = Job(rank, deadline_ns, time.time_ns(), _DeviceWork(run, done))
        with self._wake:
            if not self._jobs.put(job):
                raise QueueFullError(f"{rank.name.lower()} queue is full")
            self._wake.notify()

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

    def take_busy_s(self) -> float:
        """Seconds spent computing since the last call."""
        busy, self._busy_s = self._busy_s, 0.0
        return busy

    def stop(self, timeout_s: float = 5.0) -> None:
        """Finish the job under way, drop the rest, end the thread. Idempotent."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def _main(self) -> None:
        self._prepare()
        while (job := self._next()) is not None:
            started_ns, begin = time.time_ns(), time.perf_counter()
            value, error = None, None
            try:
                value = job.work.run()
            except Exception as caught:
                error = caught
            elapsed = time.perf_counter() - begin
            self._busy_s += elapsed
            outcome = Outcome(value, error, started_ns, (started_ns - job.queued_ns) / 1e6, elapsed * 1e3)
            try:
                self._loop.call_soon_threadsafe(job.work.done, outcome)
            except RuntimeError:  # the loop has closed: nobody is left to tell
                return

    def _next(self) -> Job[_DeviceWork] | None:
        with self._wake:
            while True:
                if self._stopping:
                    return None
                job = self._jobs.pick()
                if job is not None:
                    return job
                self._wake.wait()
