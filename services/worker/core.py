"""Which job the device runs next, and in which order batches may run.

Pure and synchronous. Jobs of one role run in the order they came (encode and decode are causal per stream, stages follow
the pipeline's sequence). Between roles the job with the nearest deadline goes first; without deadlines the one that came
first, so that encoding runs ahead as far as the credits allow and the scheduler has something to batch. At the same
instant the job nearest to the picture wins: it frees a credit.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from typing import Generic, TypeVar

from shared.contracts.events import StageBatch

T = TypeVar("T")


class Role(StrEnum):
    """What a worker may host."""

    TEXT = "text"
    ENCODE = "encode"
    STAGE = "stage"
    DECODE = "decode"


class Rank(IntEnum):
    """Order between roles at equal urgency; smaller runs first."""

    CONTROL = 0  # open, close, prompts: short, and others wait for them
    DECODE = 1
    STAGE = 2
    ENCODE = 3
    TEXT = 4


@dataclass(frozen=True, slots=True)
class Job(Generic[T]):
    """A unit of device work. ``deadline_ns`` 0: none. ``queued_ns`` is when it came.

    ``shares``: it may run beside a sharing job of another hand; else it runs alone.
    """

    rank: Rank
    deadline_ns: int
    queued_ns: int
    work: T
    shares: bool = False


ALL_RANKS = tuple(Rank)


@dataclass(slots=True)
class JobQueue(Generic[T]):
    """Bounded queues, one per rank; overflow turns the newest away, counted."""

    size: int = 256
    refused: int = 0
    _queues: dict[Rank, deque[Job[T]]] = field(default_factory=lambda: {rank: deque[Job[T]]() for rank in Rank})

    def put(self, job: Job[T]) -> bool:
        """Queue a job; False when its rank's queue is full."""
        queue = self._queues[job.rank]
        if len(queue) >= self.size:
            self.refused += 1
            return False
        queue.append(job)
        return True

    def peek(self, ranks: tuple[Rank, ...] = ALL_RANKS) -> Job[T] | None:
        """The next job of these ranks, or None when their queues are empty."""
        heads = [queue[0] for rank in ranks if (queue := self._queues[rank])]
        return min(heads, key=_urgency, default=None)

    def pick(self, ranks: tuple[Rank, ...] = ALL_RANKS) -> Job[T] | None:
        """Take the next job of these ranks, or None when their queues are empty."""
        best = self.peek(ranks)
        return None if best is None else self._queues[best.rank].popleft()

    def forget(self, *ranks: Rank) -> int:
        """Give up the jobs of these ranks; how many they were."""
        gone = sum(len(self._queues[rank]) for rank in ranks)
        for rank in ranks:
            self._queues[rank].clear()
        return gone

    def __len__(self) -> int:
        return sum(len(queue) for queue in self._queues.values())


def _urgency(job: Job[T]) -> tuple[int, int, int, int]:
    if job.rank is Rank.CONTROL:
        return (0, 0, 0, 0)
    if job.deadline_ns:
        return (1, job.deadline_ns, 0, job.rank)
    return (2, 0, job.queued_ns, job.rank)


TEXT_HEADROOM = 8 << 30
"""Bytes of a GPU's memory that the text encoder must leave free: for KV slots, VAE caches and activations."""


def choose_text_device(setting: str, device: str, free_bytes: int, needed_bytes: int) -> str:
    """Where the text encoder goes. ``auto``: beside the rest if it fits into what the other weights left free, else the CPU.

    ``device`` is the worker's, ``free_bytes`` what is free on it; a prompt is encoded once, so a slow place costs little.
    """
    if setting != "auto":
        return setting
    fits = free_bytes >= needed_bytes + TEXT_HEADROOM
    return device if device == "cpu" or fits else "cpu"


class SequenceVerdict(StrEnum):
    """What a stage makes of a batch's number."""

    RUN = "run"
    HELD = "held"  # a gap before it: wait for the missing one for a while
    REPEATED = "repeated"
    OLD = "old"  # of a generation, or a term, that is over
    FULL = "full"  # too many batches wait behind a gap


class BatchSequencer:
    """Batches run in the pipeline's dense order; a gap that does not fill is a fault, never a skip (rule 1)."""

    def __init__(self, max_held: int = 16) -> None:
        self.term = 0
        self.generation = 0
        self.expected = 0
        self.gap_since_ns = 0
        self._held: dict[int, StageBatch] = {}
        self._max_held = max_held

    def arrive(self, batch: StageBatch, now_ns: int) -> tuple[SequenceVerdict, list[StageBatch], bool]:
        """The verdict, the batches that may run now in order, and whether all slots must be emptied first."""
        if (batch.term, batch.generation) < (self.term, self.generation):
            return SequenceVerdict.OLD, [], False
        fresh = (batch.term, batch.generation) > (self.term, self.generation)
        if fresh:
            self.term, self.generation, self.expected = batch.term, batch.generation, 0
            self._held.clear()
            self.gap_since_ns = 0
        if batch.seq < self.expected or batch.seq in self._held:
            return SequenceVerdict.REPEATED, [], fresh
        if batch.seq > self.expected:
            if len(self._held) >= self._max_held:
                return SequenceVerdict.FULL, [], fresh
            self._held[batch.seq] = batch
            self.gap_since_ns = self.gap_since_ns or now_ns
            return SequenceVerdict.HELD, [], fresh
        runnable = [batch]
        self.expected += 1
        while (held := self._held.pop(self.expected, None)) is not None:
            runnable.append(held)
            self.expected += 1
        self.gap_since_ns = now_ns if self._held else 0
        return SequenceVerdict.RUN, runnable, fresh

    def begin(self, term: int, generation: int) -> None:
        """A generation begins with what the slots hold: its batches come from 0 on, and the first of them empties nothing."""
        self.term, self.generation, self.expected = term, generation, 0
        self._held.clear()
        self.gap_since_ns = 0

    def gap_age_ns(self, now_ns: int) -> int:
        """How long the oldest gap has been open; 0 when there is none."""
        return now_ns - self.gap_since_ns if self.gap_since_ns else 0
