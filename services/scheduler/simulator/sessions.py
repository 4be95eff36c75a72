"""One simulated stream: a source that numbers chunks while it has credits, as ingest does, and a player, as egress is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from services.scheduler.simulator.clock import NS_PER_S, VirtualClock
from services.scheduler.simulator.measures import Histogram, Shown, Timeline
from shared.contracts.events import ChunkStamp, FrameStamp
from shared.contracts.unchecked import unchecked
from shared.playout import PlayoutDelay

if TYPE_CHECKING:
    from services.scheduler.simulator.pipelines import SimPipeline

FIRST_CHUNK_FRAMES = 5
CHUNK_FRAMES = 4
LOST_AFTER_NS = 2 * NS_PER_S  # after its deadline egress waits no longer for a chunk
NO_STALL = frozenset({"ingest:rate", "skipped"})
"""What is left out on purpose: the picture goes on."""
FAULTS = frozenset({"scheduler:pipeline_fault", "egress:lost"})
"""What was lost for no want of time."""


def _stamp(
    stream: str, epoch: int, chunk: int, index: int, size: int, first_ns: int, frame_ns: int, deadline_ns: int, now: int
) -> ChunkStamp:
    """A live chunk's, its first frame captured at ``first_ns``."""
    frames = tuple([
        unchecked(
            FrameStamp,
            {
                "index": index + i, "pts": index + i, "captured_ns": first_ns + i * frame_ns,
                "deadline_ns": first_ns + i * frame_ns + deadline_ns, "duration": 0,
            },
        )
        for i in range(size)
    ])  # fmt: skip
    return unchecked(
        ChunkStamp,
        {
            "stream": stream, "epoch": epoch, "chunk": chunk, "frames": frames, "padding": 0, "live": True,
            "published_ns": now, "trace": "", "time_base": (1, 90_000), "begun_ns": 0,
        },
    )  # fmt: skip


class Ledger:
    """Totals over all sessions, in frames; what was shown by tenant."""

    __slots__ = ("dropped", "frames_in", "late", "on_time", "shown", "timeline")

    def __init__(self, seconds: float) -> None:
        self.frames_in = self.on_time = self.late = 0
        self.dropped: dict[str, int] = {}
        self.shown: dict[str, Shown] = {}
        self.timeline = Timeline(seconds)

    def of(self, tenant: str) -> Shown:
        """Where this tenant's sessions enter what they show."""
        return self.shown.setdefault(tenant, Shown())

    @property
    def latency(self) -> Histogram:
        """Of all tenants' frames."""
        return Histogram.merged(shown.latency for shown in self.shown.values())

    @property
    def first_frame(self) -> Histogram:
        """Of all tenants' sessions."""
        return Histogram.merged(shown.first_frame for shown in self.shown.values())

    def drop(self, key: str, frames: int) -> None:
        """Frames dropped, by "service:reason"."""
        self.dropped[key] = self.dropped.get(key, 0) + frames


class Session:
    """A stream. ``fps`` is the source's rate; ``pace`` what the ladder leaves of it (the same at first)."""

    __slots__ = (
        "_carry_ns",
        "_frame_ns",
        "_index",
        "_last_shown_ns",
        "_ledger",
        "_mine",
        "_shown",
        "_source_ns",
        "bad",
        "chunk",
        "clock",
        "credits",
        "deadline_ns",
        "dropped_frames",
        "end_ns",
        "ended",
        "epoch",
        "faulted",
        "first_capture_ns",
        "first_shown_ns",
        "fps",
        "held",
        "in_flight",
        "late",
        "name",
        "next_ns",
        "on_time",
        "open",
        "pipeline",
        "playout",
        "stalled_ns",
        "tenant",
    )  # fmt: skip

    def __init__(
        self, name: str, clock: VirtualClock, ledger: Ledger, fps: float, deadline_ns: int, credits: int, end_ns: int,
        tenant: str = "default",
    ) -> None:  # fmt: skip
        self.name, self.tenant, self.fps = name, tenant, fps
        self.deadline_ns, self.credits, self.end_ns = deadline_ns, credits, end_ns
        self.epoch = 1
        self.chunk = 0  # the next one's number
        self.in_flight = 0
        self.held = self.ended = False
        self.next_ns = 0  # when the next chunk's first frame is captured
        self.open: dict[int, ChunkStamp] = {}
        self._shown: list[int] = []  # when the last frames of chunks are shown whose credits nobody waited for yet
        self.playout = PlayoutDelay(deadline_ns)
        self.pipeline: SimPipeline | None = None
        self.on_time = self.late = self.dropped_frames = self.faulted = 0
        self.bad: list[float] = []  # chunks that were not shown in time; n − ½: frames lost before chunk n
        self.first_capture_ns = self.first_shown_ns = self._last_shown_ns = -1
        self.stalled_ns = 0
        self.clock, self._ledger, self._mine = clock, ledger, ledger.of(tenant)
        self._source_ns = self._frame_ns = round(NS_PER_S / fps)
        self._carry_ns = 0
        self._index = 0

    # --- source ------------------------------------------------------------------------------------------------------

    def begin(self, now: int) -> None:
        """The source opens: its first frame is captured now."""
        self.next_ns = self.first_capture_ns = now
        self.clock.at(now + (FIRST_CHUNK_FRAMES - 1) * self._frame_ns, self.capture, None)

    def pace(self, fps: float) -> None:
        """Take at most so many frames a second, from the next chunk on."""
        self._frame_ns = max(self._source_ns, round(NS_PER_S / fps))

    def capture(self, _: None) -> None:
        """The last frame of the next chunk was captured: number it, or hold it until a credit comes back."""
        if self.clock.now >= self.end_ns:
            self.ended = True
            self._await_credits()
            self._let_go()
            return
        if self.in_flight >= self.credits:
            self._await_credits()
        if self.in_flight >= self.credits:
            self.held = True
        else:
            self._number(self.next_ns)

    def stop(self) -> None:
        """The session ends early, whatever it holds."""
        self.end_ns = min(self.end_ns, self.clock.now)

    def _number(self, first_ns: int) -> None:
        number, frame_ns, deadline_ns, index = self.chunk, self._frame_ns, self.deadline_ns, self._index
        size = CHUNK_FRAMES if number else FIRST_CHUNK_FRAMES
        stamp = _stamp(self.name, self.epoch, number, index, size, first_ns, frame_ns, deadline_ns, self.clock.now)
        self.chunk = number + 1
        self._index = index + size
        self.in_flight += 1
        self.open[number] = stamp
        self.next_ns = first_ns + size * frame_ns
        self._ledger.frames_in += size
        if frame_ns != self._source_ns:
            self._count_rate(size)
        self.clock.at(self.next_ns + (CHUNK_FRAMES - 1) * frame_ns, self.capture, None)
        if self.pipeline is not None:
            self.pipeline.encode(self, stamp)
        else:  # nobody to take it: the stream waits to be placed again
            self.lose(number, "scheduler:pipeline_fault")

    def _count_rate(self, size: int) -> None:
        """What the source captured besides, and the ladder left out."""
        self._carry_ns += size * (self._frame_ns - self._source_ns)
        extra, self._carry_ns = divmod(self._carry_ns, self._source_ns)
        self._ledger.frames_in += extra
        self._ledger.drop("ingest:rate", extra)

    def _await_credits(self) -> None:
        """Take the credits that came back by now, and be told of the others. Nobody asks for them while there are enough."""
        now, shown = self.clock.now, self._shown
        self._shown = []
        for at in shown:
            if at <= now:
                self.in_flight -= 1
            else:
                self.clock.at(at, self._credit, None)

    def _credit(self, _: None) -> None:
        self.in_flight -= 1
        if self.held:
            # Newer frames took the place of older ones while there was no credit.
            self.held = False
            size = CHUNK_FRAMES if self.chunk else FIRST_CHUNK_FRAMES
            lost = max(0, (self.clock.now - self.next_ns) // self._frame_ns + 1 - size)
            if lost:
                self._ledger.frames_in += lost
                self._miss("ingest:no_credit", lost, self.chunk - 0.5, self.next_ns + self.deadline_ns)
                self._index += lost
            if self.clock.now >= self.end_ns:
                self.ended = True
            else:
                self._number(self.next_ns + lost * self._frame_ns)
        if self.ended:
            self._let_go()

    def _let_go(self) -> None:
        if self.in_flight == 0 and self.pipeline is not None:
            self.pipeline.leave(self)

    # --- player ------------------------------------------------------------------------------------------------------

    def ready(self, number: int, now: int) -> None:
        """The chunk's pixels are at egress at ``now``."""
        stamp = self.open.pop(number, None)
        if stamp is None:
            return
        frames = stamp.frames
        first, size = frames[0].captured_ns, len(frames)
        playout = self.playout
        playout.observe(now - first, first=number == 0)
        delay = playout.delay_ns or 0
        late = 0
        if now > first + self.deadline_ns:
            late = sum(now > frame.deadline_ns for frame in frames)
            self.bad.append(number)
        shown = max(now, first + delay)
        on_time = size - late
        self.late += late
        self.on_time += on_time
        ledger = self._ledger
        ledger.late += late
        ledger.on_time += on_time
        self._mine.latency.add(shown - first, size)
        ledger.timeline.add(first + self.deadline_ns, size, on_time, now - first)
        if self.first_shown_ns < 0:
            self.first_shown_ns = shown
            self._mine.first_frame.add(shown - self.first_capture_ns)
        else:
            self._stand(shown)
        self._last_shown_ns = last = max(now, frames[-1].captured_ns + delay)
        if self.held or self.ended:
            self.clock.at(last, self._credit, None)
        else:
            self._shown.append(last)

    def _stand(self, shown: int) -> None:
        """The picture stood until ``shown``. What it stood too long is a stall, as egress counts it: more than two frames."""
        stood, frame_ns = shown - self._last_shown_ns, self._frame_ns
        if stood > 2 * frame_ns:
            self.stalled_ns += stood - frame_ns

    def drop(self, number: int, key: str) -> None:
        """A service gave the chunk up."""
        stamp = self.open.pop(number, None)
        if stamp is not None:
            self._miss(key, len(stamp.frames), number, stamp.frames[0].deadline_ns)
            self._credit(None)

    def lose(self, number: int, key: str) -> None:
        """Nobody will tell of the chunk: egress waits for it and then closes it."""
        stamp = self.open.get(number)
        if stamp is not None:
            late_enough = stamp.frames[-1].deadline_ns + LOST_AFTER_NS
            self.clock.at(late_enough, lambda each: self.drop(*each), (number, key))

    def _miss(self, key: str, frames: int, place: float, due_ns: int) -> None:
        self.dropped_frames += frames
        self._ledger.drop(key, frames)
        if key in NO_STALL:
            self.dropped_frames -= frames
            return
        self.faulted += frames if key in FAULTS else 0
        self.bad.append(place)
        self._ledger.timeline.add(due_ns, frames, 0)

    # --- measures ----------------------------------------------------------------------------------------------------

    @property
    def due(self) -> int:
        """Frames that should have been shown, and have their verdict."""
        return self.on_time + self.late + self.dropped_frames

    def play(self) -> tuple[int, int]:
        """(nanoseconds of play, of those stalled). A session that was never shown stalled all its life."""
        begin = self.first_shown_ns if self.first_shown_ns >= 0 else self.first_capture_ns
        end = max(self._last_shown_ns, self.next_ns)  # what was captured last should have been shown about then
        stalled = self.stalled_ns + max(0, self.next_ns - max(self._last_shown_ns, begin) - self.deadline_ns)
        return end - begin, min(stalled, end - begin) if self.first_shown_ns >= 0 else end - begin

    def gaps(self, since: float = 0.0) -> int:
        """Runs of chunks, one after the other, that were not shown in time; of chunks from ``since`` on."""
        runs, before = 0, -2.0
        for place in sorted(self.bad):
            if place >= since:
                runs += place - before > 1.0
                before = place
        return runs
