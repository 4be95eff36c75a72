"""A synthetic worker: one device that runs one job at a time, as long as its profile says, with noise, stalls and losses.

Which job is next is a worker's own rule (``services/worker/core.py``): of the heads of its roles' queues the one with the
nearest deadline, at the same deadline the one nearest to the picture.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import Any

from services.scheduler.simulator.clock import NS_PER_MS, VirtualClock

NOISE_VALUES = 4096  # drawn once per simulation and walked through: drawing each would cost more than deciding


class Rank(IntEnum):
    """The roles' queues; smaller runs first at the same deadline."""

    DECODE = 0
    STAGE = 1
    ENCODE = 2


Job = tuple[int, float, Callable[[Any, float], None], Any]
"""Deadline (ns; 0: none, goes last), nominal milliseconds, who is told (with the milliseconds it took), about what."""

_Run = tuple[Rank, Job, float]
"""What runs: its queue, the job, the milliseconds that it takes."""

NO_DEADLINE = 1 << 62
_RANKS = (Rank.DECODE, Rank.STAGE, Rank.ENCODE)


def noise_table(seed: int, sigma: float, outlier_share: float, outlier_factor: float) -> tuple[float, ...]:
    """Factors on nominal times: log-normal around 1, and now and then an outlier."""
    rng = random.Random(seed)
    return tuple(
        rng.lognormvariate(0.0, sigma) * (outlier_factor if rng.random() < outlier_share else 1.0)
        for _ in range(NOISE_VALUES)
    )


class Worker:
    """One worker. ``slow`` multiplies every time (1: as its profile says); ``alive`` is False once it is lost."""

    __slots__ = (
        "_clock", "_noise", "_place", "_queues", "_running", "_stalled_until", "_waiting", "alive",
        "busy_ns", "incarnation", "name", "slow",
    )  # fmt: skip

    def __init__(self, name: str, clock: VirtualClock, noise: Sequence[float], place: int) -> None:
        self.name = name
        self.slow = 1.0
        self.alive = True
        self.incarnation = 1
        self.busy_ns = 0
        self._clock = clock
        self._noise = noise
        self._place = place % NOISE_VALUES
        self._queues: tuple[deque[Job], ...] = (deque(), deque(), deque())
        self._waiting = 0  # jobs in the queues
        self._stalled_until = 0
        self._running: _Run | None = None

    def submit(self, rank: Rank, deadline_ns: int, ms: float, done: Callable[[Any, float], None], what: Any) -> None:
        """Queue a job. A lost worker takes it and never answers, as a stopped process would."""
        if not self.alive:
            return
        job = (deadline_ns or NO_DEADLINE, ms, done, what)
        if self._running is None and not self._waiting:
            self._begin(rank, job)
            return
        self._queues[rank].append(job)
        self._waiting += 1
        if self._running is None:
            self._start()

    def stall(self, ns: int) -> None:
        """What runs, and everything after it, waits so long: the process is stopped and goes on."""
        self._stalled_until = max(self._stalled_until, self._clock.now + ns)

    def lose(self) -> list[tuple[Rank, Any]]:
        """The worker dies: what it ran and what waited, with the queue that it was in."""
        lost = [(rank, job[3]) for rank in Rank for job in self._queues[rank]]
        if self._running is not None:
            rank, job, _ = self._running
            lost.append((rank, job[3]))
        for queue in self._queues:
            queue.clear()
        self._waiting = 0
        self._running, self.alive = None, False
        return lost

    def come_back(self) -> None:
        """It was started again, empty."""
        self.alive, self.slow, self._stalled_until = True, 1.0, 0
        self.incarnation += 1

    def _start(self) -> None:
        decode, stage, encode = self._queues
        if not self._waiting:
            return
        best, nearest = -1, NO_DEADLINE + 1
        if decode:
            best, nearest = 0, decode[0][0]
        if stage and stage[0][0] < nearest:
            best, nearest = 1, stage[0][0]
        if encode and encode[0][0] < nearest:
            best = 2
        self._waiting -= 1
        self._begin(_RANKS[best], self._queues[best].popleft())

    def _begin(self, rank: Rank, job: Job) -> None:
        self._place = (self._place + 1) % NOISE_VALUES
        took = job[1] * self.slow * self._noise[self._place]
        now = self._clock.now
        begins = now if now >= self._stalled_until else self._stalled_until
        ends = begins + int(took * NS_PER_MS)
        self.busy_ns += ends - begins
        self._running = run = (rank, job, took)
        self._clock.at(ends, self._finish, run)

    def _finish(self, run: _Run) -> None:
        if run is not self._running:
            return
        rank, job, took = run
        if self._stalled_until > self._clock.now:  # stopped in the middle of it
            took += (self._stalled_until - self._clock.now) / NS_PER_MS
            self._running = run = (rank, job, took)
            self._clock.at(self._stalled_until, self._finish, run)
            return
        self._running = None
        job[2](job[3], took)
        if self._waiting and self._running is None:
            self._start()
