"""Egress' decisions: which frame is shown when, which chunk is closed how. No I/O; time is passed in (UNIX ns).

Whatever the order in which messages come, every frame has one verdict in the end, none is shown twice, and none is
shown after a newer one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from services.egress.ledger import ChunkVerdict, StreamLedger
from shared.contracts.events import ChunkStamp, FrameStamp, SourceTotals
from shared.playout import DEADLINE_MARGIN_NS, PlayoutDelay


class Arrival(StrEnum):
    """What a chunk's message is worth."""

    WANTED = "wanted"
    CLOSED = "closed"  # it has its verdict: a repetition, or too late
    REPEATED = "repeated"  # its frames are here already
    OLD_EPOCH = "old_epoch"  # a placement that was given up


@dataclass(frozen=True, slots=True)
class Emit:
    """Show frame ``position`` of ``chunk`` now."""

    chunk: int
    position: int
    frame: FrameStamp


@dataclass(frozen=True, slots=True)
class Rules:
    """The constants of one stream. ``deadline_ns`` is after capture; a lossless stream has none of the live ones."""

    live: bool
    deadline_ns: int
    lost_after_ns: int = 2_000_000_000
    reorder_ns: int = 100_000_000
    loss_timeout_ns: int = 10_000_000_000
    stall_ns: int = 60_000_000_000


@dataclass(slots=True)
class Decisions:
    """What is to be done now, in this order: show ``emits``, then record ``closes``; ``failure`` ends the run."""

    emits: list[Emit] = field(default_factory=list[Emit])
    closes: list[ChunkVerdict] = field(default_factory=list[ChunkVerdict])
    failure: str | None = None


@dataclass(slots=True)
class _Chunk:
    """An open chunk. ``frames`` None: known by its number alone. ``ready_ns`` 0: its pixels have not come."""

    seen_ns: int
    frames: tuple[FrameStamp, ...] | None = None
    ready_ns: int = 0
    shown: int = 0
    on_time: int = 0
    late: int = 0
    dropped: dict[str, int] = field(default_factory=dict[str, int])


class StreamCore:
    """One stream's playout. Messages go in by their methods; :meth:`due` says what to do at a time."""

    def __init__(self, rules: Rules, epoch: int, ledger: StreamLedger | None = None) -> None:
        self.rules, self.epoch = rules, epoch
        self.ledger = ledger or StreamLedger()
        self.delay = PlayoutDelay(rules.deadline_ns)
        self._chunks: dict[int, _Chunk] = {}
        self._cursor = self.ledger.through  # the chunk to be shown next; what lies below was shown or passed by
        self._closes: list[ChunkVerdict] = []
        self._gap_since: int | None = None
        self._last_arrival_ns = 0
        self._failure: str | None = None
        self._aborted = False
        self._given_up_below, self._given_up = 0, ""

    # --- messages ----------------------------------------------------------------------------------------------------

    def captured(self, stamp: ChunkStamp, totals: SourceTotals, now: int) -> None:
        """Ingest numbered a chunk. Of any epoch: what it says of the source stays true."""
        if self._aborted:
            return
        self.ledger.observe(totals, ended=False)
        self._know(stamp, now)
        self._note_numbers(now)
        if stamp.epoch < self._given_up_below:
            self._close_unseen(stamp.chunk, self._given_up)

    def ended(self, totals: SourceTotals, now: int) -> None:
        """The source gives nothing more."""
        if self._aborted:
            return
        if not self.ledger.ended:
            self._last_arrival_ns = max(self._last_arrival_ns, now)
        self.ledger.observe(totals, ended=True)
        self._note_numbers(now)

    def arrival(self, stamp: ChunkStamp) -> Arrival:
        """Whether the frames of this chunk are wanted, before they are fetched."""
        if self._aborted or self.ledger.is_closed(stamp.chunk):
            return Arrival.CLOSED
        if stamp.epoch < self.epoch:
            return Arrival.OLD_EPOCH
        known = self._chunks.get(stamp.chunk)
        return Arrival.REPEATED if known is not None and known.ready_ns else Arrival.WANTED

    def ready(self, stamp: ChunkStamp, now: int) -> Arrival:
        """The frames of a chunk are here. Anything but WANTED: let them go."""
        arrival = self.arrival(stamp)
        if arrival is not Arrival.WANTED:
            return arrival
        self._know(stamp, now)
        self._last_arrival_ns = now
        if stamp.chunk < self._cursor:
            self._close_unseen(stamp.chunk, "egress:overtaken")
            return Arrival.CLOSED
        chunk = self._chunks[stamp.chunk]
        chunk.ready_ns = now
        if self.rules.live and stamp.frames:
            self.delay.observe(now - stamp.frames[0].captured_ns, first=stamp.chunk == 0)
        return Arrival.WANTED

    def dropped(self, stamp: ChunkStamp, key: str, skipped: bool, now: int) -> bool:
        """A service gave a chunk up (``key`` is "service:reason"), or skipped it. False when that is old news."""
        number = stamp.chunk
        known = self._chunks.get(number)
        if self._aborted or self.ledger.is_closed(number) or (known is not None and known.ready_ns):
            return False
        self._know(stamp, now)
        self._last_arrival_ns = now
        if skipped:
            self._close(ChunkVerdict(number, skipped=self.ledger.frames_of(number)))
        else:
            self._close_unseen(number, key)
            if not self.rules.live:
                self._failure = self._failure or f"chunk {number} was dropped ({key}); a lossless run may lose nothing"
        return True

    def give_up(self, epoch: int, key: str) -> None:
        """Chunks of epochs before this one that have not come will not come (``key`` is "service:reason")."""
        self.epoch = max(self.epoch, epoch)
        if self._aborted or not self.rules.live or epoch <= self._given_up_below:
            return
        self._given_up_below, self._given_up = epoch, key
        for number in self.ledger.open_chunks():
            known = self._chunks.get(number)
            if known is None or not known.ready_ns:
                self._close_unseen(number, key)

    def lose(self, stamp: ChunkStamp, key: str) -> None:
        """The frames were announced, but cannot be had."""
        if not self._aborted and not self.ledger.is_closed(stamp.chunk):
            self._close_unseen(stamp.chunk, key)
            if not self.rules.live:
                self._failure = self._failure or f"the frames of chunk {stamp.chunk} are gone ({key})"

    def abort(self, key: str) -> list[ChunkVerdict]:
        """Nothing more is shown: close every open chunk, what was shown of it as it was, the rest as dropped.

        The ledger is final from here on: what ingest still sends of a stream that was given up is not counted.
        """
        for number in self.ledger.open_chunks():
            self._close_unseen(number, key)
        self.ledger.settle()
        self._chunks.clear()
        self._aborted = True
        return self._take_closes()

    # --- time --------------------------------------------------------------------------------------------------------

    def due(self, now: int, room: int) -> Decisions:
        """What to do at ``now`` when the sinks take ``room`` frames."""
        decisions = Decisions(failure=self._failure)
        if self._failure is None:
            self._play(now, room, decisions)
            if self.rules.live:
                self._give_up(now)
            else:
                decisions.failure = self._stalled(now)
        decisions.closes = self._take_closes()
        return decisions

    def next_at(self, now: int) -> int | None:
        """When :meth:`due` may have something new to say without another message; None: not by time alone."""
        times: list[int] = []
        chunk = self._chunks.get(self._cursor)
        if chunk is not None and chunk.ready_ns:
            # Lossless: it waits for room in the sinks, not for a time.
            times += [self._show_at(chunk, now)] if self.rules.live else []
        elif (newer := self._next_ready()) is not None:
            times.append(self._overtake_at(newer, now))
        if self.rules.live:
            times += [self._lost_at(open_chunk) for open_chunk in self._chunks.values() if not open_chunk.ready_ns]
        elif self.ledger.ended and not self.ledger.complete:
            times.append(self._last_arrival_ns + self.rules.stall_ns)
        return min(times, default=None)

    @property
    def complete(self) -> bool:
        """The source has ended and every frame has its verdict."""
        return self.ledger.complete and not self._closes

    def buffered(self) -> int:
        """Chunks whose frames wait to be shown."""
        return sum(bool(chunk.ready_ns) for chunk in self._chunks.values())

    # --- showing -----------------------------------------------------------------------------------------------------

    def _play(self, now: int, room: int, decisions: Decisions) -> None:
        while True:
            if self.ledger.is_closed(self._cursor):
                self._cursor += 1
                self._gap_since = None
                continue
            chunk = self._chunks.get(self._cursor)
            if chunk is not None and chunk.ready_ns:
                if not self._show(self._cursor, chunk, now, room - len(decisions.emits), decisions):
                    return
                continue
            newer = self._next_ready()
            if newer is None:
                return
            if self._gap_since is None:
                self._gap_since = now
            if not self.rules.live or now < self._overtake_at(newer, now):
                return
            # Whatever of the gap still comes is too late to be shown.
            self._cursor = newer
            self._gap_since = None

    def _show(self, number: int, chunk: _Chunk, now: int, room: int, decisions: Decisions) -> bool:
        """Show what is due of the chunk at the cursor; True when all of it is done."""
        assert chunk.frames is not None
        for position in range(chunk.shown, len(chunk.frames)):
            frame = chunk.frames[position]
            if self.rules.live and now < self._show_at(chunk, now):
                return False
            if room <= 0:
                if not self.rules.live:
                    return False
                chunk.dropped["egress:sink_full"] = chunk.dropped.get("egress:sink_full", 0) + 1
            else:
                room -= 1
                decisions.emits.append(Emit(number, position, frame))
                if self.rules.live and now > frame.deadline_ns:
                    chunk.late += 1
                else:
                    chunk.on_time += 1
            chunk.shown = position + 1
        self._close(ChunkVerdict(number, chunk.on_time, chunk.late, 0, chunk.dropped))
        return True

    def _show_at(self, chunk: _Chunk, now: int) -> int:
        if not self.rules.live or not chunk.frames or chunk.shown >= len(chunk.frames):
            return now
        return max(chunk.ready_ns, self.delay.playout(chunk.frames[chunk.shown].captured_ns))

    def _next_ready(self) -> int | None:
        return min((n for n, chunk in self._chunks.items() if chunk.ready_ns and n > self._cursor), default=None)

    def _overtake_at(self, newer: int, now: int) -> int:
        """When the newer chunk stops waiting for the older ones (live), or the run fails (lossless)."""
        since = now if self._gap_since is None else self._gap_since
        if not self.rules.live:
            return since + self.rules.loss_timeout_ns
        chunk = self._chunks[newer]
        assert chunk.frames
        own = self._show_at(chunk, now)
        latest = chunk.frames[0].deadline_ns - DEADLINE_MARGIN_NS
        return max(own, min(own + self.rules.reorder_ns, latest))

    # --- giving up ---------------------------------------------------------------------------------------------------

    def _give_up(self, now: int) -> None:
        for number in [n for n, chunk in self._chunks.items() if not chunk.ready_ns and now >= self._lost_at(chunk)]:
            self._close_unseen(number, "egress:lost")

    def _lost_at(self, chunk: _Chunk) -> int:
        deadline = chunk.frames[-1].deadline_ns if chunk.frames else chunk.seen_ns + self.rules.deadline_ns
        return deadline + self.rules.lost_after_ns

    def _stalled(self, now: int) -> str | None:
        if self._gap_since is not None and now - self._gap_since >= self.rules.loss_timeout_ns:
            waited = self.rules.loss_timeout_ns / 1e9
            return f"chunk {self._cursor} was lost on its way: newer ones came, it did not in {waited:g} s"
        waiting = self.ledger.ended and not self.ledger.complete and not self.buffered()
        if waiting and now - self._last_arrival_ns >= self.rules.stall_ns:
            waited = self.rules.stall_ns / 1e9
            return f"chunk {self._cursor} did not come: the source has ended, and nothing came for {waited:g} s"
        return None

    # --- bookkeeping -------------------------------------------------------------------------------------------------

    def _know(self, stamp: ChunkStamp, now: int) -> None:
        if self.ledger.is_closed(stamp.chunk):
            return
        self.ledger.know(stamp.chunk, len(stamp.frames))
        chunk = self._chunks.setdefault(stamp.chunk, _Chunk(now))
        if chunk.frames is None:
            chunk.frames = stamp.frames

    def _note_numbers(self, now: int) -> None:
        """Chunks that only the totals tell of are waited for as well."""
        for number in self.ledger.open_chunks():
            self._chunks.setdefault(number, _Chunk(now))

    def _close_unseen(self, number: int, key: str) -> None:
        """Close with what was shown, and the rest dropped."""
        chunk = self._chunks.get(number) or _Chunk(0)
        dropped = dict(chunk.dropped)
        rest = self.ledger.frames_of(number) - chunk.on_time - chunk.late - sum(dropped.values())
        if rest:
            dropped[key] = dropped.get(key, 0) + rest
        self._close(ChunkVerdict(number, chunk.on_time, chunk.late, 0, dropped))

    def _close(self, verdict: ChunkVerdict) -> None:
        if self.ledger.close(verdict):
            self._closes.append(verdict)
        self._chunks.pop(verdict.chunk, None)

    def _take_closes(self) -> list[ChunkVerdict]:
        closes, self._closes = self._closes, []
        return closes
