"""Ingest's decisions: which frames make a chunk, when it may be numbered, what is dropped. No I/O; time is passed in."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from enum import StrEnum
from typing import Generic, TypeVar

from shared.contracts.events import SourceTotals

FIRST_CHUNK_FRAMES = 5
CHUNK_FRAMES = 4

Pixels = TypeVar("Pixels")


class DropReason(StrEnum):
    """Why a captured frame was never numbered."""

    NO_CREDIT = "no_credit"  # the rest of the way is full; newer frames took its place
    BEHIND = "behind"  # the source could not be read as fast as it plays
    STOPPED = "stopped"  # the stream was stopped before its chunk was full
    RATE = "rate"  # under load the stream takes fewer frames a second
    PAUSED = "paused"  # it came while the stream was paused
    RECOVERING = "recovering"  # it came while the stream had no pipeline
    RESIZED = "resized"  # it came while the stream changed its size, or has the size before


@dataclass(frozen=True, slots=True)
class Captured(Generic[Pixels]):
    """One source frame: ``index`` counts captured frames from 0; ``pts`` and ``duration`` are in source ticks."""

    index: int
    pts: int
    duration: int
    captured_ns: int
    pixels: Pixels


@dataclass(frozen=True, slots=True)
class Chunk(Generic[Pixels]):
    """A numbered chunk. ``padding`` repetitions of its last frame make up its size."""

    number: int
    frames: tuple[Captured[Pixels], ...]
    padding: int


def chunk_frames(number: int) -> int:
    """Pixel frames of a chunk: 5 for a stream's first, then 4."""
    return FIRST_CHUNK_FRAMES if number == 0 else CHUNK_FRAMES


class Intake(Generic[Pixels]):
    """The one unnumbered chunk of a stream, its credits and its totals.

    ``credits`` is W: the chunks that may be numbered but not closed. Frames go in by :meth:`offer`; :meth:`take` gives
    a chunk whenever one may be numbered. Lossless callers offer only while :attr:`has_room`; a live caller always
    offers, and the oldest waiting frame makes room for the newest.
    """

    def __init__(self, *, live: bool, credits: int, totals: SourceTotals | None = None, closed_chunks: int = 0) -> None:
        if credits < 1:
            raise ValueError(f"{credits} credits: a stream needs at least one")
        totals = totals or SourceTotals()
        self.live = live
        self.credits = credits
        self.ended = False
        self.paused = False
        self.held = False
        self.held_for = DropReason.RECOVERING
        self._captured = totals.captured
        self._numbered = totals.numbered
        self._chunks = totals.chunks
        self._dropped = dict(totals.dropped)
        self._closed = closed_chunks
        self._pending: deque[Captured[Pixels]] = deque()
        self._progress_s: float | None = None
        # What a dead predecessor had captured and never numbered is gone: it stays accounted for.
        lost = self._captured - self._numbered - sum(self._dropped.values())
        if lost > 0:
            self._count(DropReason.STOPPED, lost)

    @property
    def in_flight(self) -> int:
        """Chunks numbered and not closed."""
        return max(0, self._chunks - self._closed)

    @property
    def has_room(self) -> bool:
        """Whether a frame can be offered without dropping another."""
        return len(self._pending) < chunk_frames(self._chunks)

    @property
    def waiting(self) -> int:
        """Frames that wait for the rest of their chunk or for a credit."""
        return len(self._pending)

    @property
    def newest_captured_ns(self) -> int:
        """When the newest waiting frame was captured; 0 when none waits."""
        return self._pending[-1].captured_ns if self._pending else 0

    @property
    def chunks(self) -> int:
        """Chunks numbered so far."""
        return self._chunks

    @property
    def finished(self) -> bool:
        """The source ended and everything it gave has been numbered or dropped."""
        return self.ended and not self._pending

    @property
    def all_closed(self) -> bool:
        """Finished, and every chunk has its verdict."""
        return self.finished and self._closed >= self._chunks

    def totals(self) -> SourceTotals:
        """The running totals, as they travel with every chunk."""
        return SourceTotals(
            captured=self._captured, numbered=self._numbered, chunks=self._chunks, dropped=dict(self._dropped)
        )

    def offer(self, pts: int, duration: int, captured_ns: int, pixels: Pixels) -> None:
        """A captured frame. Raises ValueError for a lossless stream without room, or after the end."""
        if self.ended:
            raise ValueError("a frame came after the end of the source")
        if not self.has_room:
            if not self.live:
                raise ValueError("a lossless stream has no room for this frame; wait for a credit")
            self._pending.popleft()
            self._count(DropReason.NO_CREDIT, 1)
        self._pending.append(Captured(self._captured, pts, duration, captured_ns, pixels))
        self._captured += 1

    def drop(self, reason: DropReason, frames: int = 1) -> None:
        """Frames that were captured and are not even offered."""
        self._captured += frames
        self._count(reason, frames)

    def take(self, now_s: float) -> Chunk[Pixels] | None:
        """The next chunk, if one is full (or the last one) and a credit is free."""
        size = chunk_frames(self._chunks)
        ready = len(self._pending) >= size or (self.ended and bool(self._pending))
        if not ready or self.paused or self.held or self.in_flight >= self.credits:
            return None
        frames = tuple(self._pending)
        self._pending.clear()
        chunk = Chunk(self._chunks, frames, size - len(frames))
        if self.in_flight == 0:
            self._progress_s = now_s
        self._chunks += 1
        self._numbered += len(frames)
        return chunk

    def end(self) -> None:
        """No frame follows. What waits still becomes a last, padded chunk when a credit is free."""
        self.ended = True

    def pause(self) -> None:
        """Number nothing until :meth:`resume`. A live stream gives up the frames that wait: they would be too old."""
        self.paused = True
        if self.live:
            self.drop_pending(DropReason.PAUSED)

    def resume(self) -> None:
        """Go on numbering."""
        self.paused = False

    def hold(self, held: bool, reason: DropReason = DropReason.RECOVERING) -> None:
        """Live: there is nowhere to go for now. The frames that wait are given up: they would be too old."""
        self.held, self.held_for = held, reason
        if held:
            self.drop_pending(reason)

    def stop(self) -> None:
        """End now: what has not been numbered is dropped."""
        self.ended, self.paused, self.held = True, False, False
        self.drop_pending(DropReason.STOPPED)

    def drop_pending(self, reason: DropReason) -> None:
        """Give up the unnumbered frames."""
        self._count(reason, len(self._pending))
        self._pending.clear()

    def closed(self, closed_chunks: int, now_s: float) -> None:
        """Egress has closed so many chunks in all. Cumulative: repetitions and late ones change nothing."""
        if closed_chunks > self._closed:
            self._closed = min(closed_chunks, self._chunks)
            self._progress_s = now_s

    def stalled_s(self, now_s: float) -> float:
        """For how long chunks have been under way without any verdict. In a pause a longer block waits for its rest."""
        if self.paused:
            self._progress_s = now_s
        if self.in_flight == 0 or self._progress_s is None:
            return 0.0
        return now_s - self._progress_s

    @property
    def oldest_open(self) -> int:
        """The number of the first chunk that may still be open."""
        return self._closed

    def _count(self, reason: DropReason, frames: int) -> None:
        if frames:
            self._dropped[reason.value] = self._dropped.get(reason.value, 0) + frames
