"""Source timestamps: repaired where they run backwards, kept everywhere else; or resampled to a constant rate."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Generic, TypeVar

Pixels = TypeVar("Pixels")

# A gap longer than this is kept as a gap: filling it would repeat one picture for minutes.
MAX_FILL_S = 10
TICKS_PER_FRAME = 1000


class Monotonic:
    """Makes timestamps ascend strictly. Forward jumps are kept; a jump back goes on where the last frame ended."""

    def __init__(self) -> None:
        self.repaired = 0
        self._last: int | None = None
        self._last_raw = 0
        self._offset = 0
        self._step = 1

    def repair(self, pts: int | None, duration: int) -> int:
        """The timestamp to use for a frame stamped ``pts`` (None: unknown) that lasts ``duration`` ticks (0: unknown)."""
        last = self._last
        if last is None:
            self._last = self._last_raw = pts or 0
            self._step = max(1, duration)
            return self._last
        step = max(1, duration or self._step)
        raw = self._last_raw + step if pts is None else pts
        # After a single wrong stamp the next one fits without the correction; after a restarted clock it does not.
        if self._offset and last < raw <= last + 2 * step:
            self._offset = 0
        out = raw + self._offset
        if out <= last:
            self.repaired += 1
            out = last + step
            self._offset = out - raw
        elif not self._offset:
            self._step = min(out - last, max(step, 1)) if duration else out - last
        self._last, self._last_raw = out, raw
        return out


@dataclass(frozen=True, slots=True)
class Timed(Generic[Pixels]):
    """A frame with its timestamp and duration in ticks."""

    pts: int
    duration: int
    pixels: Pixels


class AsIs(Generic[Pixels]):
    """The source's own timestamps, variable frame rates included."""

    def __init__(self, time_base: Fraction) -> None:
        self.time_base = time_base

    def feed(self, frame: Timed[Pixels]) -> Iterator[Timed[Pixels]]:
        """One frame in, the same out."""
        yield frame

    def flush(self) -> Iterator[Timed[Pixels]]:
        """Nothing is held back."""
        return iter(())


class ConstantRate(Generic[Pixels]):
    """``fps`` frames a second: the picture shown at each instant, repeated or left out as the source's rate asks.

    Output timestamps are in ``time_base`` = 1/(1000·fps) and start at the source's own first one, so sound stays
    aligned.
    """

    def __init__(self, source_base: Fraction, fps: float) -> None:
        self._rate = Fraction(fps).limit_denominator(1001)
        self._source_base = source_base
        self.time_base = 1 / (self._rate * TICKS_PER_FRAME)
        self._first: Fraction | None = None
        self._held: Timed[Pixels] | None = None
        self._next = 0

    def feed(self, frame: Timed[Pixels]) -> Iterator[Timed[Pixels]]:
        """Every output frame that is due before ``frame`` is shown."""
        time = frame.pts * self._source_base
        if self._first is None or self._held is None:
            self._first, self._held = time, frame
            return
        until = round((time - self._first) * self._rate)
        yield from self._emit(until)
        self._held = frame

    def flush(self) -> Iterator[Timed[Pixels]]:
        """What the last frame is shown for. A source of a single short frame still gives one."""
        if self._held is None or self._first is None:
            return
        end = (self._held.pts + self._held.duration) * self._source_base
        until = round((end - self._first) * self._rate)
        yield from self._emit(until if self._next else max(1, until))
        self._held = None

    def _emit(self, until: int) -> Iterator[Timed[Pixels]]:
        assert self._held is not None
        assert self._first is not None
        if until - self._next > MAX_FILL_S * self._rate:
            yield self._at(self._next, self._held)
            self._next = until
        while self._next < until:
            yield self._at(self._next, self._held)
            self._next += 1

    def _at(self, number: int, frame: Timed[Pixels]) -> Timed[Pixels]:
        assert self._first is not None
        return Timed(round(self._first / self.time_base) + number * TICKS_PER_FRAME, TICKS_PER_FRAME, frame.pixels)
