"""Where in a slot's ring a latent frame is kept.

A ring has ``length`` places, each for one latent frame; the first ``sinks`` are kept for good. Frames fill the places in
order; after that each one overwrites the oldest frame that is no sink. Counting the frames of a slot from its reset,
that is a closed form, which a device can compute without a queue::

    place(i) = i                                          while i < sinks
             = sinks + (i − sinks) mod (length − sinks)   after that

A write of T frames takes T such places in turn. It may begin at the last place and go on at the first one after the
sinks (wrap-around): its places are then not contiguous, but always distinct, because T ≤ length − sinks. Attention
does not care for the order of places, only which frame stands where matters.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

Contents = tuple[int | None, ...]
"""The latent frame in each place, None for a place that holds none."""


class RingError(ValueError):
    """A write that the ring cannot take; the message says which size would fit."""


def place_of(index: int, length: int, sinks: int) -> int:
    """The place of the ``index``-th frame (from 0) written since the reset."""
    return index if index < sinks else sinks + (index - sinks) % (length - sinks)


def places_of(written: int, frames: int, length: int, sinks: int) -> tuple[int, ...]:
    """The places of the next ``frames`` frames after ``written`` ones."""
    return tuple(place_of(index, length, sinks) for index in range(written, written + frames))


def _check_shape(length: int, sinks: int) -> None:
    if not 0 <= sinks < length:
        raise RingError(f"{sinks} sinks in a ring of {length}: at least one place must roll")


class Ring:
    """The rolling cache as it should be: sinks stay, the oldest other frame goes.

    Frames are named by any integers that the caller counts with (RoPE start frames, or latent frames of the stream).
    """

    def __init__(self, length: int, sinks: int) -> None:
        _check_shape(length, sinks)
        self.length = length
        self.sinks = sinks
        self._written = 0  # frames written in turn; replaced sinks do not count
        self._contents: list[int | None] = [None] * length
        self._last: tuple[int, tuple[int, ...]] | None = None

    def write(self, first: int, frames: int) -> tuple[int, ...]:
        """Take frames ``first`` … ``first + frames − 1``; returns their places, in order.

        The same ``first`` and ``frames`` as in the write before overwrite the same places: the ring does not advance.
        Raises RingError when the frames do not fit: an empty ring takes ``length`` at once, a used one
        ``length − sinks``.
        """
        if self._last is not None and self._last[0] == first and len(self._last[1]) == frames:
            return self._last[1]
        most = self.length if self._written == 0 else self.length - self.sinks
        if not 1 <= frames <= most:
            raise RingError(f"{frames} latent frames do not fit into a ring of {self.length}: 1…{most} do")
        places = places_of(self._written, frames, self.length, self.sinks)
        for offset, place in enumerate(places):
            self._contents[place] = first + offset
        self._written += frames
        self._last = (first, places)
        return places

    def write_sink(self, first: int, sink: int) -> tuple[int, ...]:
        """Take frame ``first`` into place ``sink`` instead of a rolling place (an adaptive sink is replaced).

        Only a sink that holds a frame can be replaced: an empty place is similar to nothing.
        """
        if not 0 <= sink < self.sinks or self._contents[sink] is None:
            raise RingError(f"place {sink} is no sink that holds a frame")
        self._contents[sink] = first
        self._last = (first, (sink,))
        return (sink,)

    @property
    def valid(self) -> int:
        """How many places hold a frame: places 0 … valid − 1, which attention reads."""
        return min(self._written, self.length)

    @property
    def contents(self) -> Contents:
        """Which frame stands in which place."""
        return tuple(self._contents)

    def reset(self) -> None:
        """Empty."""
        self._written = 0
        self._contents = [None] * self.length
        self._last = None

    def copy(self) -> Ring:
        """An equal ring that goes on by itself (a fork)."""
        twin = Ring(self.length, self.sinks)
        twin._written, twin._contents, twin._last = self._written, list(self._contents), self._last
        return twin


SinkTest = Callable[[Contents], int | None]
"""Reads the ring before a write and names the sink to replace, or None. Called at every forward, fills included."""


class ReferenceRing:
    """The ring exactly as the public code evicts, faults included, for replaying recorded data.

    A queue holds ends of places. It is fed while the ring fills, so its order is not the order of age; the first write's
    own place never leaves whole; after the first eviction the whole ring counts as valid, never-written places too. A
    sink that failed its test is put in front of the queue at once, even while the ring fills, and goes only at a later
    eviction: last in, first out, and then it is not put back.
    """

    def __init__(self, length: int, sinks: int, sink_test: SinkTest | None = None) -> None:
        _check_shape(length, sinks)
        self.length = length
        self.sinks = sinks
        self._sink_test = sink_test
        self._queue: deque[int] = deque()
        self._valid = 0
        self._contents: list[int | None] = [None] * length
        self._last: tuple[int, int, int] | None = None  # first, frames, place

    def write(self, first: int, frames: int) -> tuple[int, ...]:
        """Take ``frames`` frames from ``first`` on; returns their contiguous places. A repeated ``first`` overwrites."""
        if self._sink_test is not None and (sink := self._sink_test(self.contents)) is not None:
            self.hit(sink)
        if self._last is not None and self._last[:2] == (first, frames):
            place = self._last[2]
        elif self._valid + frames <= self.length:
            place = self._fill(frames)
        else:
            place = self._evict(frames)
        for offset in range(frames):
            self._contents[place + offset] = first + offset
        self._last = (first, frames, place)
        return tuple(range(place, place + frames))

    def hit(self, sink: int) -> None:
        """The sink in place ``sink`` failed its test: it is the next to be evicted."""
        if not 0 <= sink < self.sinks:
            raise RingError(f"place {sink} is no sink")
        self._queue.appendleft(sink + 1)

    def _fill(self, frames: int) -> int:
        place, end = self._valid, self._valid + frames
        following = end + frames
        if self.sinks < following <= self.length and (not self._queue or self._queue[-1] != following):
            self._queue.append(following)
        self._valid = end
        return place

    def _evict(self, frames: int) -> int:
        if not self._queue:
            raise RingError(f"{frames} latent frames do not fit and nothing can be evicted")
        end = self._queue.popleft()
        if end < frames:
            raise RingError(f"{frames} latent frames do not fit before place {end}")
        if end > self.sinks:
            self._queue.append(end)
        self._valid = self.length
        return end - frames

    @property
    def valid(self) -> int:
        """How many places attention reads, places 0 … valid − 1; never-written ones among them hold zeros."""
        return self._valid

    @property
    def contents(self) -> Contents:
        """Which frame stands in which place; None for one never written."""
        return tuple(self._contents)

    @property
    def queue(self) -> tuple[int, ...]:
        """Ends of places, the next to be evicted first."""
        return tuple(self._queue)

    def reset(self) -> None:
        """Empty, the eviction order too (which the public code forgets between sessions)."""
        self._queue.clear()
        self._valid = 0
        self._contents = [None] * self.length
        self._last = None

    def copy(self) -> ReferenceRing:
        """An equal ring that goes on by itself; the sink test is shared."""
        twin = ReferenceRing(self.length, self.sinks, self._sink_test)
        twin._queue, twin._valid, twin._contents = deque(self._queue), self._valid, list(self._contents)
        twin._last = self._last
        return twin
