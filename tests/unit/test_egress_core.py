"""Egress' decisions under a clock that the test moves: even playout, one verdict a frame, nothing out of order."""

from __future__ import annotations

from fractions import Fraction

from services.egress.core import Arrival, Emit, Rules, StreamCore
from services.egress.ledger import ChunkVerdict, StreamLedger
from services.egress.stats import LatencyHistogram, StreamMeter
from shared.contracts.events import ChunkStamp, FrameStamp, LedgerTotals, SourceTotals
from shared.playout import EASE_MOST_NS, EASE_NS, MARGIN_NS, WINDOW, PlayoutDelay

MS = 1_000_000
FRAME = 40 * MS
DEADLINE = 600 * MS
START = 1_700_000_000_000 * MS
LIVE = Rules(live=True, deadline_ns=DEADLINE)
LOSSLESS = Rules(live=False, deadline_ns=0)


def size(chunk: int) -> int:
    return 5 if chunk == 0 else 4


def first_index(chunk: int) -> int:
    return 0 if chunk == 0 else 5 + 4 * (chunk - 1)


def stamp(chunk: int, *, live: bool = True, epoch: int = 1, frames: int | None = None) -> ChunkStamp:
    count = size(chunk) if frames is None else frames
    first = first_index(chunk)
    made = tuple(
        FrameStamp(
            index=first + i,
            pts=first + i,
            captured_ns=START + (first + i) * FRAME,
            deadline_ns=START + (first + i) * FRAME + DEADLINE if live else 0,
        )
        for i in range(count)
    )
    return ChunkStamp(stream="s", epoch=epoch, chunk=chunk, frames=made, padding=size(chunk) - count, live=live)


def totals(chunks: int, frames: int | None = None) -> SourceTotals:
    numbered = first_index(chunks) if frames is None else frames
    return SourceTotals(captured=numbered, numbered=numbered, chunks=chunks)


def last_captured(chunk: int) -> int:
    return stamp(chunk).frames[-1].captured_ns


class Player:
    """Plays a core in small steps of time and notes what is shown when."""

    def __init__(self, core: StreamCore, room: int = 1000) -> None:
        self.core, self.room, self.now = core, room, START
        self.shown: list[tuple[int, Emit]] = []
        self.closed: list[ChunkVerdict] = []
        self.failure: str | None = None

    def until(self, time: int) -> None:
        while self.failure is None:
            decisions = self.core.due(self.now, self.room)
            self.shown += [(self.now, emit) for emit in decisions.emits]
            self.closed += decisions.closes
            self.failure = decisions.failure
            following = self.core.next_at(self.now)
            if following is None or following > time:
                break
            self.now = max(self.now + 1, following)
        self.now = max(self.now, time)

    def arrive(self, chunk: int, latency: int) -> None:
        """The chunk is announced when it is captured, and its frames come ``latency`` later."""
        at = last_captured(chunk) + latency
        self.until(at)
        self.core.captured(stamp(chunk), totals(chunk + 1), at)
        self.core.ready(stamp(chunk), at)

    @property
    def indices(self) -> list[int]:
        return [emit.frame.index for _, emit in self.shown]


def test_frames_come_out_as_evenly_as_they_were_captured_whatever_the_jitter() -> None:
    player = Player(StreamCore(LIVE, 1))
    for chunk in range(30):
        player.arrive(chunk, (60 + 37 * chunk % 80) * MS)
    player.until(START + 10_000 * MS)
    assert player.indices == list(range(first_index(30)))
    settled = [time for time, emit in player.shown if emit.chunk >= 4]
    gaps = [b - a for a, b in zip(settled, settled[1:], strict=False)]
    uneven = sorted(abs(gap - FRAME) for gap in gaps)
    assert uneven[int(0.95 * len(uneven))] <= 2 * EASE_NS
    assert uneven[-1] < 20 * MS, "a chunk that is slower than nearly all others is not waited for, and still not seen"
    assert all(verdict.on_time == verdict.frames for verdict in player.closed)


def test_a_late_frame_is_counted_late_and_shown_at_once() -> None:
    player = Player(StreamCore(LIVE, 1))
    player.arrive(0, 50 * MS)
    player.arrive(1, DEADLINE + 30 * MS)
    player.until(player.now)
    assert [v for v in player.closed if v.chunk == 1] == [ChunkVerdict(1, on_time=0, late=4)]
    assert player.indices == list(range(9))


def test_an_overtaken_chunk_is_waited_for_a_little_and_then_never_shown() -> None:
    player = Player(StreamCore(LIVE, 1))
    core = player.core
    player.arrive(0, 50 * MS)
    player.arrive(1, 50 * MS)
    player.until(last_captured(3) + 50 * MS)
    for chunk in (2, 3):
        core.captured(stamp(chunk), totals(4), player.now)
    core.ready(stamp(3), player.now)
    player.until(player.now + 60 * MS)
    core.ready(stamp(2), player.now)  # a little late: still in order
    player.until(player.now + 400 * MS)
    assert player.indices == list(range(first_index(4)))

    core.captured(stamp(5), totals(6), player.now)
    player.until(last_captured(5) + 50 * MS)
    core.ready(stamp(5), player.now)
    player.until(player.now + 600 * MS)
    assert core.ready(stamp(4), player.now) is Arrival.CLOSED
    player.until(player.now)
    assert player.indices == [*range(first_index(4)), *range(first_index(5), first_index(6))]
    assert core.ledger.totals().dropped == {"egress:overtaken": 4}


def test_what_never_comes_is_lost_two_seconds_after_its_deadline() -> None:
    player = Player(StreamCore(LIVE, 1))
    player.arrive(0, 50 * MS)
    player.core.captured(stamp(1), totals(2), player.now)
    player.core.ended(totals(2), player.now)
    due = stamp(1).frames[-1].deadline_ns + 2000 * MS
    player.until(due - 1 * MS)
    assert not player.core.complete
    player.until(due)
    assert player.core.complete
    assert player.core.ledger.totals() == LedgerTotals(frames_in=9, on_time=5, dropped={"egress:lost": 4})


def test_a_chunk_known_by_its_number_alone_is_accounted_to_the_frame() -> None:
    player = Player(StreamCore(LIVE, 1))
    player.arrive(0, 50 * MS)
    # Chunks 1, 2 and the padded chunk 3 are lost with all their messages; only the totals tell of them.
    player.core.ended(totals(4, frames=5 + 4 + 4 + 3), player.now)
    player.until(player.now + 60_000 * MS)
    assert player.core.complete
    assert player.core.ledger.totals().dropped == {"egress:lost": 11}


def test_other_services_drops_and_skips_are_booked_under_their_names() -> None:
    player = Player(StreamCore(LIVE, 1))
    player.arrive(0, 50 * MS)
    core = player.core
    for chunk in (1, 2):
        core.captured(stamp(chunk), totals(chunk + 1), player.now)
    assert core.dropped(stamp(1), "scheduler:stale", False, player.now)
    assert core.dropped(stamp(2), "motion:still", True, player.now)
    assert not core.dropped(stamp(1), "scheduler:again", False, player.now), "the first verdict wins"
    core.ended(totals(3), player.now)
    player.until(player.now + 1000 * MS)
    assert core.ledger.totals() == LedgerTotals(frames_in=13, on_time=5, skipped=4, dropped={"scheduler:stale": 4})
    assert core.complete


def test_a_full_sink_costs_a_live_frame_and_holds_up_a_lossless_one() -> None:
    live = Player(StreamCore(LIVE, 1), room=3)
    live.core.captured(stamp(0), totals(1), START)
    live.core.ready(stamp(0), START + 500 * MS)
    decisions = live.core.due(START + 760 * MS, 3)
    assert len(decisions.emits) == 3
    assert live.core.ledger.totals().dropped == {"egress:sink_full": 2}

    core = StreamCore(LOSSLESS, 1)
    core.ready(stamp(0, live=False), START)
    assert len(core.due(START, 3).emits) == 3
    assert core.next_at(START) is None, "it waits for room, not for time"
    assert [emit.position for emit in core.due(START, 10).emits] == [3, 4]


def test_old_epochs_are_ignored_but_their_totals_and_drops_count() -> None:
    core = StreamCore(LIVE, 3)
    core.captured(stamp(0, epoch=2), totals(1), START)
    assert core.arrival(stamp(0, epoch=2)) is Arrival.OLD_EPOCH
    assert core.ready(stamp(0, epoch=2), START) is Arrival.OLD_EPOCH
    assert core.dropped(stamp(0, epoch=2), "scheduler:replaced", False, START)
    core.ended(totals(1), START)
    assert core.due(START, 10).failure is None
    assert core.complete


def test_chunks_of_a_placement_that_was_given_up_are_closed_at_once_but_what_came_is_shown() -> None:
    player = Player(StreamCore(LIVE, 1))
    core = player.core
    player.arrive(0, 50 * MS)
    for chunk in (1, 2):
        core.captured(stamp(chunk), totals(3), player.now)
    core.give_up(3, "scheduler:recovering")
    core.captured(stamp(3), totals(4), player.now)  # numbered before ingest was told, heard after
    assert core.arrival(stamp(1)) is Arrival.CLOSED
    player.until(last_captured(4) + 50 * MS)
    core.captured(stamp(4, epoch=3), totals(5), player.now)
    core.ready(stamp(4, epoch=3), player.now)
    core.give_up(3, "scheduler:recovering")  # told twice
    core.ended(totals(5), player.now)
    player.until(player.now + 1000 * MS)
    assert player.indices == [*range(5), *range(first_index(4), first_index(5))]
    assert core.ledger.totals() == LedgerTotals(frames_in=21, on_time=9, dropped={"scheduler:recovering": 12})
    assert core.complete


def test_a_lossless_run_fails_when_a_gap_is_not_filled() -> None:
    core = StreamCore(LOSSLESS, 1)
    core.ready(stamp(0, live=False), START)
    core.ready(stamp(2, live=False), START)
    assert len(core.due(START, 100).emits) == 5
    assert core.due(START + 9_000 * MS, 100).failure is None
    assert core.next_at(START + 9_000 * MS) == START + 10_000 * MS
    failure = core.due(START + 10_000 * MS, 100).failure
    assert failure is not None
    assert "chunk 1" in failure


def test_a_lossless_gap_that_is_filled_in_time_costs_nothing() -> None:
    core = StreamCore(LOSSLESS, 1)
    for chunk in (0, 2):
        core.ready(stamp(chunk, live=False), START)
    core.due(START, 100)
    core.ready(stamp(1, live=False), START + 9_000 * MS)
    assert [emit.chunk for emit in core.due(START + 9_000 * MS, 100).emits] == [1] * 4 + [2] * 4
    assert core.due(START + 60_000 * MS, 100).failure is None


def test_a_lossless_run_fails_when_nothing_comes_after_the_end() -> None:
    core = StreamCore(LOSSLESS, 1)
    core.ready(stamp(0, live=False), START)
    core.due(START, 100)
    core.ended(totals(3), START + 1_000 * MS)
    assert core.due(START + 60_000 * MS, 100).failure is None
    failure = core.due(START + 61_000 * MS, 100).failure
    assert failure is not None
    assert "chunk 1" in failure


def test_a_drop_fails_a_lossless_run_and_a_skip_does_not() -> None:
    core = StreamCore(LOSSLESS, 1)
    core.dropped(stamp(0, live=False), "motion:still", True, START)
    assert core.due(START, 100).failure is None
    core.dropped(stamp(1, live=False), "scheduler:fault", False, START)
    failure = core.due(START, 100).failure
    assert failure is not None
    assert "scheduler:fault" in failure


def test_giving_up_closes_every_frame_and_what_ingest_had_not_numbered() -> None:
    core = StreamCore(LIVE, 1)
    core.captured(stamp(0), totals(1), START)
    core.ready(stamp(0), START + 300 * MS)
    core.due(START + 335 * MS, 100)  # the first frames only
    shown = core.due(START + 360 * MS, 100)
    core.captured(stamp(1), SourceTotals(captured=14, numbered=9, chunks=2, dropped={"no_credit": 2}), START + 370 * MS)
    core.abort("worker:was lost")
    totals_now = core.ledger.totals()
    assert not shown.failure
    assert totals_now.frames_in == totals_now.closed == 14
    assert totals_now.dropped["ingest:no_credit"] == 2
    assert totals_now.dropped["ingest:lost"] == 3
    assert totals_now.on_time + totals_now.dropped["worker:was lost"] == 9
    assert core.complete


def test_a_successor_keeps_what_its_predecessor_closed() -> None:
    ledger = StreamLedger(LedgerTotals(frames_in=13, on_time=9, dropped={"egress:lost": 4}), closed_chunks=3, through=3)
    player = Player(StreamCore(LIVE, 2, ledger))
    assert player.core.ready(stamp(2, epoch=2), START) is Arrival.CLOSED
    player.until(last_captured(3))
    player.core.captured(stamp(3, epoch=2), totals(4), player.now)
    player.core.ready(stamp(3, epoch=2), player.now)
    player.core.ended(totals(4), player.now)
    player.until(player.now + 1000 * MS)
    assert player.indices == [13, 14, 15, 16]
    assert player.core.ledger.totals() == LedgerTotals(frames_in=17, on_time=13, dropped={"egress:lost": 4})


def test_the_playout_delay_grows_at_once_and_shrinks_slowly() -> None:
    delay = PlayoutDelay(DEADLINE)
    delay.observe(200 * MS)
    assert delay.delay_ns == 200 * MS + MARGIN_NS
    delay.observe(300 * MS)
    high = 300 * MS + MARGIN_NS
    assert delay.delay_ns == high
    before = high
    for _ in range(2 * WINDOW):
        delay.observe(100 * MS)
        assert before - EASE_MOST_NS <= delay.delay_ns <= before
        before = delay.delay_ns
    assert delay.delay_ns < 100 * MS + MARGIN_NS + 2 * EASE_NS, "what is too much is forgotten in time"
    delay.observe(5_000 * MS)
    assert delay.delay_ns < DEADLINE, "one hopeless chunk must not make the next ones late"


def test_single_late_chunks_do_not_hold_up_every_frame_and_a_slower_stream_does() -> None:
    delay = PlayoutDelay(DEADLINE)
    for chunk in range(3 * WINDOW):
        delay.observe((450 if chunk and chunk % WINDOW == 0 else 330) * MS)
    assert delay.delay_ns == 330 * MS + MARGIN_NS
    for _ in range(5):  # more than a tenth of the window
        delay.observe(420 * MS)
    assert delay.delay_ns == 420 * MS + MARGIN_NS


def test_the_first_chunk_begins_the_playout_and_is_forgotten_within_two_seconds() -> None:
    delay = PlayoutDelay(DEADLINE)
    delay.observe(470 * MS, first=True)
    assert delay.delay_ns == 470 * MS + MARGIN_NS
    for _ in range(16):
        delay.observe(330 * MS)
    assert delay.delay_ns < 370 * MS


def test_the_playout_delay_is_bound_by_the_streams_own_deadline() -> None:
    for deadline in (200 * MS, 1500 * MS):
        delay = PlayoutDelay(deadline)
        for _ in range(WINDOW):
            delay.observe(deadline - 5 * MS)
        assert delay.delay_ns == deadline - deadline // 10


def source_frame(index: int) -> FrameStamp:
    return FrameStamp(index=index, pts=index, captured_ns=START + index * FRAME, duration=1)


def test_figures_are_right_within_a_percent() -> None:
    histogram = LatencyHistogram()
    for ms in range(1, 1001):
        histogram.add(float(ms))
    assert abs(histogram.percentile(0.5) / 500 - 1) < 0.01
    assert abs(histogram.percentile(0.95) / 950 - 1) < 0.01
    meter = StreamMeter(START)
    for index in range(11):
        meter.emitted(source_frame(index), START + index * FRAME + 200 * MS, Fraction(1, 25))
    stats = meter.stats()
    assert abs(stats.fps - 25) < 0.01
    assert abs(stats.ttff_s - 0.2) < 0.001
    assert stats.frames_out == 11
    assert stats.cpr == 1.0
    assert stats.jitter_p95_ms < 0.2
    assert abs(stats.latency_p99_ms / 200 - 1) < 0.01


def test_uneven_frames_are_jitter_and_a_standing_picture_is_a_stall() -> None:
    meter = StreamMeter(START)
    for index in range(100):
        late = 12 * MS if index % 2 else 0
        meter.emitted(source_frame(index), START + index * FRAME + 200 * MS + late, Fraction(1, 25))
    stats = meter.stats()
    assert abs(stats.jitter_p95_ms - 12) < 0.2
    assert stats.cpr == 1.0, "no picture stood for two frames' time"
    # 25 frames are lost: the picture stands for a second.
    meter.emitted(source_frame(125), START + 125 * FRAME + 200 * MS, Fraction(1, 25))
    assert abs(meter.stats().cpr - (1 - 25 / 125)) < 0.01


def test_what_is_skipped_or_paused_on_purpose_is_no_stall() -> None:
    meter = StreamMeter(START)
    for index in (*range(50), *range(90, 140)):
        if index == 90:
            meter.excuse(40)
        meter.emitted(source_frame(index), START + index * FRAME + 200 * MS, Fraction(1, 25))
    assert meter.stats().cpr == 1.0
    assert meter.stats().jitter_p95_ms < 0.2
