"""Whatever the bus loses, repeats, delays or swaps: every frame has one verdict, and is shown at most once, in order."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from services.egress.core import Arrival, Emit, Rules, StreamCore
from services.egress.ledger import ChunkVerdict, StreamLedger
from services.ingest.core import Intake, chunk_frames
from shared.contracts.events import ChunkStamp, FrameStamp, SourceTotals

MS = 1_000_000
START = 1_700_000_000_000 * MS
FRAME = 40 * MS
DEADLINE = 400 * MS


def chunks_of(frames: int, live: bool) -> list[tuple[ChunkStamp, SourceTotals]]:
    """A source of so many frames as ingest numbers it."""
    out: list[tuple[ChunkStamp, SourceTotals]] = []
    first = 0
    while first < frames:
        size = chunk_frames(len(out))
        count = min(size, frames - first)
        stamps = tuple(
            FrameStamp(
                index=i, pts=i, captured_ns=START + i * FRAME, deadline_ns=START + i * FRAME + DEADLINE if live else 0
            )
            for i in range(first, first + count)
        )
        first += count
        stamp = ChunkStamp(stream="s", epoch=1, chunk=len(out), frames=stamps, padding=size - count, live=live)
        out.append((stamp, SourceTotals(captured=first, numbered=first, chunks=len(out) + 1)))
    return out


def run(core: StreamCore, now: int, room: int, shown: list[Emit], closed: list[ChunkVerdict]) -> str | None:
    decisions = core.due(now, room)
    shown += decisions.emits
    closed += decisions.closes
    return decisions.failure


def check(core: StreamCore, shown: list[Emit], closed: list[ChunkVerdict], frames: int) -> None:
    totals = core.ledger.totals()
    assert totals.frames_in == totals.closed == frames
    indices = [emit.frame.index for emit in shown]
    assert indices == sorted(set(indices)), "each at most once, never after a newer one"
    numbers = [verdict.chunk for verdict in closed]
    assert len(numbers) == len(set(numbers)), "one verdict a chunk"
    assert sum(verdict.frames for verdict in closed) == frames
    assert totals.on_time + totals.late == len(shown)


@settings(max_examples=300, deadline=None)
@given(data=st.data(), frames=st.integers(1, 45))
def test_a_live_ledger_always_reconciles(data: st.DataObject, frames: int) -> None:
    source = chunks_of(frames, live=True)
    events: list[tuple[int, str, int]] = []
    for number, (stamp, _) in enumerate(source):
        captured = stamp.frames[-1].captured_ns
        for kind, spread in (("captured", 300), ("ready", 900), ("dropped", 900)):
            chance = {"captured": 0.85, "ready": 0.8, "dropped": 0.1}[kind]
            for _ in range(2):
                if data.draw(st.floats(0, 1)) < chance:
                    events.append((captured + data.draw(st.integers(0, spread)) * MS, kind, number))
                chance /= 4
    end = source[-1][0].frames[-1].captured_ns + data.draw(st.integers(0, 500)) * MS
    events.append((end, "ended", -1))
    core = StreamCore(Rules(live=True, deadline_ns=DEADLINE), 1)
    shown: list[Emit] = []
    closed: list[ChunkVerdict] = []
    for time, kind, number in sorted(events):
        room = data.draw(st.integers(0, 12))
        run(core, time, room, shown, closed)
        if kind == "ended":
            core.ended(source[-1][1], time)
        elif kind == "captured":
            core.captured(*source[number], time)
        elif kind == "ready":
            core.ready(source[number][0], time)
        else:
            core.dropped(source[number][0], "scheduler:stale", data.draw(st.booleans()), time)
        run(core, time, room, shown, closed)
    now = max(end, events[-1][0])
    for _ in range(2000):
        if core.complete:
            break
        following = core.next_at(now)
        assert following is not None, "nothing is left to wait for, and still not complete"
        now = max(now + 1, following)
        assert run(core, now, 100, shown, closed) is None
    assert core.complete
    check(core, shown, closed, frames)


@settings(max_examples=200, deadline=None)
@given(data=st.data(), frames=st.integers(1, 45))
def test_a_lossless_run_shows_everything_in_order_or_fails_and_reconciles(data: st.DataObject, frames: int) -> None:
    source = chunks_of(frames, live=False)
    lost = data.draw(st.sets(st.integers(0, len(source) - 1), max_size=1))
    order = data.draw(st.permutations([n for n in range(len(source)) if n not in lost] * 2))
    core = StreamCore(Rules(live=False, deadline_ns=0), 1)
    shown: list[Emit] = []
    closed: list[ChunkVerdict] = []
    failure: str | None = None
    for step, number in enumerate(order):
        now = START + step * MS
        if data.draw(st.booleans()):
            core.captured(*source[number], now)
        assert core.ready(source[number][0], now) in (Arrival.WANTED, Arrival.REPEATED, Arrival.CLOSED)
        failure = failure or run(core, now, data.draw(st.integers(0, 9)), shown, closed)
    now = START + len(order) * MS
    core.ended(source[-1][1], now)
    for _ in range(200):
        failure = failure or run(core, now, 100, shown, closed)
        if core.complete or failure:
            break
        now = max(now + 1, core.next_at(now) or now + 100 * MS)
    if lost:
        assert failure is not None
        closed += core.abort("egress:lost")
    else:
        assert failure is None
        assert [emit.frame.index for emit in shown] == list(range(frames))
    check(core, shown, closed, frames)


@settings(max_examples=200, deadline=None)
@given(data=st.data(), frames=st.integers(1, 60))
def test_a_stream_given_up_at_any_moment_reconciles(data: st.DataObject, frames: int) -> None:
    source = chunks_of(frames, live=True)
    core = StreamCore(Rules(live=True, deadline_ns=DEADLINE), 1)
    shown: list[Emit] = []
    closed: list[ChunkVerdict] = []
    seen = 0
    for stamp, totals in source[: data.draw(st.integers(0, len(source)))]:
        now = stamp.frames[-1].captured_ns
        run(core, now, 100, shown, closed)
        if data.draw(st.booleans()):
            core.captured(stamp, totals, now)
            seen = totals.numbered
        if data.draw(st.booleans()):
            core.ready(stamp, now)
        run(core, now + data.draw(st.integers(0, 500)) * MS, 100, shown, closed)
    closed += core.abort("worker:lost")
    for stamp, totals in source:  # what still comes changes nothing
        now = stamp.frames[-1].captured_ns
        core.captured(stamp, totals, now)
        assert core.ready(stamp, now) is Arrival.CLOSED
        assert not core.dropped(stamp, "scheduler:stale", False, now)
    totals = core.ledger.totals()
    assert totals.frames_in == totals.closed >= seen
    assert core.complete


@given(st.lists(st.integers(0, 30), min_size=1, max_size=80), st.integers(1, 45))
def test_the_first_verdict_wins_in_any_order(order: list[int], frames: int) -> None:
    source = chunks_of(frames, live=True)
    ledger = StreamLedger()
    ledger.observe(source[-1][1], ended=True)
    given_first: dict[int, ChunkVerdict] = {}
    for turn, number in enumerate(order):
        if number >= len(source):
            continue
        count = ledger.frames_of(number) if not ledger.is_closed(number) else 4
        verdict = ChunkVerdict(number, on_time=count) if turn % 2 else ChunkVerdict(number, dropped={"a:b": count})
        assert ledger.close(verdict) is (number not in given_first)
        given_first.setdefault(number, verdict)
    for number in ledger.open_chunks():
        assert ledger.close(ChunkVerdict(number, late=ledger.frames_of(number)))
    totals = ledger.totals()
    assert ledger.complete
    assert totals.frames_in == totals.closed == frames
    assert totals.on_time == sum(verdict.on_time for verdict in given_first.values())


@settings(max_examples=200, deadline=None)
@given(data=st.data(), live=st.booleans(), credits=st.integers(1, 5))
def test_no_frame_is_lost_between_the_source_and_the_chunks(data: st.DataObject, live: bool, credits: int) -> None:
    intake: Intake[int] = Intake(live=live, credits=credits)
    numbered: list[int] = []
    chunks = closed = captured = 0
    for _ in range(data.draw(st.integers(1, 120))):
        if data.draw(st.booleans()) and chunks > closed:
            closed += data.draw(st.integers(0, chunks - closed))
            intake.closed(closed, 0.0)
        if live or intake.has_room:
            intake.offer(captured, 1, captured, captured)
            captured += 1
        while (chunk := intake.take(0.0)) is not None:
            assert len(chunk.frames) == chunk_frames(chunk.number)
            numbered += [frame.index for frame in chunk.frames]
            chunks += 1
        assert intake.in_flight <= credits
        assert intake.waiting <= 5
    intake.end()
    intake.closed(chunks, 0.0)
    if (chunk := intake.take(0.0)) is not None:
        numbered += [frame.index for frame in chunk.frames]
        assert len(chunk.frames) + chunk.padding == chunk_frames(chunk.number)
    totals = intake.totals()
    assert totals.captured == captured == totals.numbered + sum(totals.dropped.values())
    assert numbered == sorted(set(numbered))
    assert len(numbered) == totals.numbered
    if not live:
        assert numbered == list(range(captured))
