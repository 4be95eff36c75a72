"""A worker that stood still notices it itself, and live work that came too late is not computed. Pure; time is passed in."""

from __future__ import annotations

from collections.abc import Callable

from services.worker.device_thread import Outcome
from shared.contracts.events import ChunkStamp


class StaleError(RuntimeError):
    """The chunk's deadline had passed before the device got to it."""


def is_stale(stamp: ChunkStamp, now_ns: int) -> bool:
    """Whether not even the last frame of a live chunk could be shown in time."""
    return stamp.live and bool(stamp.frames) and now_ns > stamp.frames[-1].deadline_ns > 0


class Fence:
    """Watches this process' own clock: who did nothing for ``limit_s`` sent no heartbeat either, and was given up (rule 6).

    Whoever is stopped (or starved, or was swapped out) cannot know what has been decided meanwhile: all that it holds is
    worthless. ``check`` is called whenever anything is done here, at least every 0.1 s.
    """

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._seen: float | None = None

    def check(self, now: float) -> bool:
        """Whether more than the limit has passed since the last call. ``now`` in seconds, monotonic."""
        seen, self._seen = self._seen, now
        return seen is not None and now - seen > self._limit_s


class Lives:
    """Between two fences a worker has one life: what was begun in an earlier one comes to nothing."""

    def __init__(self) -> None:
        self._life = 0

    def end(self) -> None:
        """Everything that is under way is of an earlier life from here on."""
        self._life += 1

    def of_this(self, done: Callable[[Outcome], None]) -> Callable[[Outcome], None]:
        """``done``, unless this life has ended before it is called."""
        life = self._life

        def call(outcome: Outcome) -> None:
            if life == self._life:
                done(outcome)

        return call
