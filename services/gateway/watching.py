"""What happens to streams, for whoever looks: a bounded history of events, receipts of commands, live figures."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, field

from services.gateway.errors import BusyError, UnknownPartError
from shared.bus.port import Bus, Received
from shared.contracts import subjects
from shared.contracts.events import ChunkClosed, ChunkEnd, EventKind, StreamEvent
from shared.contracts.sinks import SinkFigures
from shared.contracts.views import LiveStats, ReceiptView
from shared.session.port import ENDED_TTL_S

MAX_STREAMS = 1024
MAX_EVENTS = 256
FOLLOWER_EVENTS = 64
WINDOW_S = 5.0
MAX_SAMPLES = 256
STATS_EVERY_S = 1.0
ENDS = (EventKind.STOPPED, EventKind.FAILED)


@dataclass(frozen=True, slots=True)
class Told:
    """An event with its id: when it was told and by whom, which another gateway's history names alike."""

    id: str
    event: StreamEvent


@dataclass(frozen=True, slots=True)
class _Sample:
    at_s: float
    on_time: int
    late: int
    latency_ms: float


@dataclass(slots=True)
class Follower:
    """One client of a stream's events. ``behind``: it took them too slowly, and is let go."""

    queue: asyncio.Queue[Told] = field(default_factory=lambda: asyncio.Queue[Told](FOLLOWER_EVENTS))
    behind: bool = False


@dataclass(slots=True)
class _Stream:
    history: deque[Told] = field(default_factory=lambda: deque[Told](maxlen=MAX_EVENTS))
    followers: list[Follower] = field(default_factory=lambda: list[Follower]())
    samples: deque[_Sample] = field(default_factory=lambda: deque[_Sample](maxlen=MAX_SAMPLES))
    newest: ChunkClosed | None = None
    newest_ns: int = 0
    sinks: tuple[SinkFigures, ...] = ()

    def begin(self, kept: Iterable[Told] = ()) -> None:
        """A new life of the id, of which only ``kept`` is known. Who follows stays."""
        self.history = deque(kept, maxlen=MAX_EVENTS)
        self.samples.clear()
        self.newest, self.newest_ns, self.sinks = None, 0, ()


class Watch:
    """Hears every stream's events and verdicts. ``counters`` has what was dropped."""

    def __init__(self, bus: Bus, max_followers: int = 1024) -> None:
        self._bus, self._max_followers = bus, max_followers
        self._streams: OrderedDict[str, _Stream] = OrderedDict()
        self._following = 0
        self.on_progress: list[Callable[[str, int], None]] = []
        self.on_ends: list[Callable[[str, tuple[ChunkEnd, ...]], None]] = []
        self.on_end: list[Callable[[str], None]] = []
        self.counters: dict[str, int] = {"followers_dropped": 0, "streams_forgotten": 0}

    async def start(self) -> None:
        """Listen; events that were kept by the broker come first, so that a restart loses nothing."""
        await self._bus.subscribe(subjects.stream(subjects.ANY, "event"), self._on_event, replay=True)
        await self._bus.subscribe(subjects.stream(subjects.ANY, "closed"), self._on_closed)

    def _of(self, stream: str) -> _Stream:
        found = self._streams.get(stream)
        if found is None:
            found = self._streams[stream] = _Stream()
            while len(self._streams) > MAX_STREAMS:
                self._forget_one()
        return found

    def _forget_one(self) -> None:
        """The stream that has been silent for longest, of those that nobody follows."""
        idle = next((name for name, held in self._streams.items() if not held.followers), next(iter(self._streams)))
        del self._streams[idle]
        self.counters["streams_forgotten"] += 1

    async def _on_event(self, received: Received) -> None:
        event: StreamEvent = received.message
        held = self._of(event.stream)
        self._streams.move_to_end(event.stream)
        told = Told(f"{event.at_ns}-{event.service}", event)
        if received.redelivered and any(told.id == other.id for other in held.history):
            return
        if (kept := after_end(held.history, event)) is not None:
            held.begin(kept)
        held.history.append(told)
        if event.event in ENDS:
            for tell_end in self.on_end:
                tell_end(event.stream)
        for follower in held.followers:
            if follower.behind:
                continue
            if follower.queue.full():
                follower.behind = True
                self.counters["followers_dropped"] += 1
            else:
                follower.queue.put_nowait(told)

    async def _on_closed(self, received: Received) -> None:
        closed: ChunkClosed = received.message
        held = self._of(closed.stream)
        if held.newest is not None and closed.epoch < held.newest.epoch:
            return
        fresh = held.newest is None or closed.closed_chunks != held.newest.closed_chunks
        held.newest, held.newest_ns = closed, received.received_ns
        held.sinks = held.sinks if closed.sinks is None else closed.sinks
        if closed.ends:
            for tell in self.on_ends:
                tell(closed.stream, closed.ends)
        if fresh:
            totals = closed.totals
            held.samples.append(_Sample(time.monotonic(), totals.on_time, totals.late, closed.latency_ms))
            for tell in self.on_progress:
                tell(closed.stream, closed.through)

    def begin(self, stream: str) -> None:
        """A new stream of this id is about to be asked for: what was told of one before it is not of it. Who follows stays."""
        if (held := self._streams.get(stream)) is not None:
            held.begin()

    # --- what is asked -----------------------------------------------------------------------------------------------

    def stats(self, stream: str) -> LiveStats:
        """The stream's figures now; zeros where nothing was heard of it."""
        held = self._streams.get(stream)
        if held is None or held.newest is None:
            return LiveStats()
        now = time.monotonic()
        recent = [sample for sample in held.samples if now - sample.at_s <= WINDOW_S]
        fps, on_time = 0.0, 1.0
        if len(recent) >= 2:
            first, last = recent[0], recent[-1]
            shown = (last.on_time + last.late) - (first.on_time + first.late)
            fps = max(0.0, shown / max(last.at_s - first.at_s, 1e-3))
            on_time = (last.on_time - first.on_time) / shown if shown > 0 else 1.0
        latencies = sorted(sample.latency_ms for sample in recent) or [held.newest.latency_ms]
        return LiveStats(
            fps=round(fps, 2),
            latency_ms=round(latencies[len(latencies) // 2], 1),
            latency_p95_ms=round(latencies[min(len(latencies) - 1, int(len(latencies) * 0.95))], 1),
            on_time=round(max(0.0, min(1.0, on_time)), 4),
            chunk=held.newest.through - 1,
            at_ns=held.newest_ns,
            ledger=held.newest.totals,
        )

    def sinks(self, stream: str) -> tuple[SinkFigures, ...]:
        """How the stream's sinks fare, as told at most a second ago; empty when nothing was heard."""
        held = self._streams.get(stream)
        return () if held is None else held.sinks

    def chunk(self, stream: str) -> int:
        """The newest closed chunk, −1 when none is known."""
        held = self._streams.get(stream)
        return -1 if held is None or held.newest is None else held.newest.through - 1

    def history(self, stream: str) -> list[Told]:
        """The events kept of a stream, oldest first."""
        held = self._streams.get(stream)
        return [] if held is None else list(held.history)

    def receipt(self, stream: str, command: str) -> ReceiptView:
        """What became of a command. Raises UnknownPartError when nothing is known of it (any more)."""
        events = [told.event for told in self.history(stream) if told.event.command == command]
        if not command or not events:
            raise UnknownPartError(f"nothing is known of command {command[:64]!r} of stream {stream}")
        last = events[-1]
        applied = next((event for event in reversed(events) if event.chunk >= 0), last)
        return ReceiptView(
            stream=stream,
            command=command,
            state=last.event.value,
            version=max(event.version for event in events),
            chunk=applied.chunk,
            pts=applied.pts,
            until_chunk=applied.until_chunk,
            reason=last.reason,
            events=events,
        )

    async def follow(self, stream: str, after: str | None) -> AsyncIterator[Told | LiveStats]:
        """Events after the one of id ``after`` (None: only new ones) as they come, and once a second the figures.

        Ends after the stream's last event, or when the client falls behind: it may come back with the last id it saw.
        """
        with self._follower(stream) as follower:
            missed = [] if after is None else since(self.history(stream), after)
            for told in missed:
                yield told
                if told.event.event in ENDS and told is missed[-1]:
                    return
            shown = LiveStats()
            while not follower.behind:
                try:
                    told = await asyncio.wait_for(follower.queue.get(), STATS_EVERY_S)
                except TimeoutError:
                    stats = self.stats(stream)
                    if stats != shown:
                        shown = stats
                        yield stats
                    continue
                yield told
                if told.event.event in ENDS:
                    return

    @contextmanager
    def _follower(self, stream: str) -> Generator[Follower]:
        if self._following >= self._max_followers:
            raise BusyError(f"{self._max_followers} clients follow events already")
        held, follower = self._of(stream), Follower()
        held.followers.append(follower)
        self._following += 1
        try:
            yield follower
        finally:
            self._following -= 1
            held.followers.remove(follower)


def after_end(history: Iterable[Told], event: StreamEvent) -> list[Told] | None:
    """What was told after the end of a former stream of the id, when ``event`` is of a new one; None when it is not.

    Another gateway may have been asked for it, and after a restart the broker's events of both come again. The new one's epoch
    is higher, or begins at 1 again once the session of the old one was forgotten; what the scheduler tells has none.
    """
    told = list(history)
    ended = next((n for n in reversed(range(len(told))) if told[n].event.event in ENDS), None)
    if ended is None:
        return None
    end = told[ended].event
    accepted = event.event is EventKind.ACCEPTED and event.promise is not None  # a start, no change
    later = 0 < end.epoch < event.epoch or (event.epoch > 0 and event.at_ns - end.at_ns > ENDED_TTL_S * 1e9)
    return told[ended + 1 :] if accepted or later else None


def since(history: list[Told], after: str) -> list[Told]:
    """What came after the event of this id; if it is not kept any more, what was told later than it says."""
    for index, told in enumerate(history):
        if told.id == after:
            return history[index + 1 :]
    moment, _, _ = after.partition("-")
    at_ns = int(moment) if moment.isascii() and moment.isdigit() and len(moment) < 20 else 0
    return [told for told in history if told.event.at_ns > at_ns]
