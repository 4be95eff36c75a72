"""The ends of streams at egress and ingest: slow stores, a bus that refuses, waits that are given up."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from services.ingest.feed import Feed
from services.ingest.reader import Item, Reader
from services.ingest.sources.pattern import PatternSource as Pattern
from shared.bus.port import BusUnavailableError
from shared.contracts import subjects
from shared.contracts.commands import LeaveStream, Mode, PatternSource, StreamSpec, TakeStream
from shared.contracts.events import EventKind, StreamEvent
from shared.session.memory import MemoryStore
from shared.session.state import StreamState
from tests.support import clips
from tests.support.media_bench import Bench, bench


@pytest_asyncio.fixture
async def media(tmp_path: Path, run_id: str) -> AsyncIterator[Bench]:
    async with bench(tmp_path, run_id, loss_timeout_s=0.5, stall_s=5.0, repeat_s=0.2) as running:
        yield running


class _SlowStore(MemoryStore):
    """Has a verdict at once and answers late; as ``asyncio.wait_for`` of Python 3.11 it may swallow a cancellation."""

    swallows = False

    async def close_chunk(self, stream: str, chunk: int, verdict: dict[str, int]) -> bool:
        first = await super().close_chunk(stream, chunk, verdict)
        try:
            await asyncio.sleep(0.3)
        except asyncio.CancelledError:
            if not self.swallows:
                raise
        return first


@pytest.mark.parametrize("swallows", [False, True])
async def test_an_end_that_comes_while_a_verdict_is_written_loses_nothing_and_comes(
    tmp_path: Path, run_id: str, swallows: bool
) -> None:
    store = _SlowStore()
    store.swallows = swallows
    async with bench(tmp_path, run_id, store=store, repeat_s=0.2) as media:
        stream = await media.begin(clips.make_clip(tmp_path / "in.mp4", frames=5), tmp_path / "out.mp4")
        event = await media.end(5)
        totals, closed, _ = await store.ledger(stream)
        assert event.totals is not None
        assert (event.totals.frames_in, event.totals.on_time) == (5, 5)
        assert totals == event.totals
        assert media.closed[-1].closed_chunks == closed == 1, "ingest gets every credit back"


async def test_a_bus_that_refuses_events_for_a_while_does_not_lose_the_end(
    media: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bus: Any = media.egress._bus
    publish, refused = bus.publish, list[EventKind]()

    async def moody(subject: str, message: Any, headers: Any = None) -> None:
        if isinstance(message, StreamEvent) and message.service == "egress" and len(refused) < 3:
            refused.append(message.event)
            raise BusUnavailableError("no receipt")
        await publish(subject, message, headers)

    monkeypatch.setattr(bus, "publish", moody)
    stream = await media.begin(clips.make_cut_clip(tmp_path / "in.mp4", frames=40), tmp_path / "out.mp4")
    event = await media.end()
    assert refused == [EventKind.WARNING, EventKind.STOPPED, EventKind.STOPPED]
    assert event.event is EventKind.STOPPED
    session = await media.store.get(stream)
    assert session is not None
    assert session["state"] is StreamState.STOPPED
    assert (await media.store.ledger(stream))[0] == event.totals


async def test_a_subscription_that_fails_leaves_nothing_open_and_the_next_assignment_works(
    media: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bus: Any = media.egress._bus
    subscribe, seen = bus.subscribe, list[tuple[str, list[str], tuple[str, ...]]]()

    async def moody(pattern: str, handler: Any, **options: Any) -> Any:
        if pattern.endswith(".frames") and not seen:
            seen.append((pattern, [p.name for p in tmp_path.glob("*.part*")], media.egress.streams))
            raise BusUnavailableError("cannot subscribe")
        return await subscribe(pattern, handler, **options)

    monkeypatch.setattr(bus, "subscribe", moody)
    event = await media.run(clips.make_clip(tmp_path / "in.mp4", frames=9), tmp_path / "out.mp4")
    assert seen
    assert seen[0][1:] == ([], ())
    assert event.event is EventKind.STOPPED
    assert event.totals is not None
    assert event.totals.on_time == 9
    assert len(clips.timestamps(tmp_path / "out.mp4")) == 9


class _Closing(Pattern):
    closed = False

    def close(self) -> None:
        self.closed = True
        super().close()


async def test_a_source_that_opens_after_nobody_waits_is_closed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    broken: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", broken.append)
    source, go = _Closing(96, 64, 0, 30.0), threading.Event()

    def open_it() -> Pattern:
        go.wait(5)
        return source

    feed: Feed[Item] = Feed(asyncio.get_running_loop(), asyncio.Event(), 8)
    reader = Reader("late", open_it, feed, behind_ns=None)
    reader.start()
    with suppress(TimeoutError):
        async with asyncio.timeout(0.1):
            await asyncio.wrap_future(reader.opened)
    feed.stop()
    go.set()
    await reader.stop()
    assert source.closed
    assert not broken, "its thread ended in order"


class _DeafStore(MemoryStore):
    """Reading a session takes a while, and swallows a cancellation."""

    async def get(self, stream: str) -> Any:
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(0.3)
        return await super().get(stream)


async def test_a_stream_that_is_left_while_it_opens_is_not_played(tmp_path: Path, run_id: str) -> None:
    async with bench(tmp_path, run_id, store=_DeafStore()) as media:
        spec = StreamSpec(source=PatternSource(), prompt="as it is", mode=Mode.LIVE)
        take = TakeStream(
            instance="ingest-0", stream="s", epoch=1, spec=spec, width=96, height=64, noise=0.5, credits=4
        )
        await media.bus.publish(subjects.assign("ingest"), take)
        while not media.ingest.streams:
            await asyncio.sleep(0.01)
        leave = LeaveStream(instance="ingest-0", stream="s", epoch=1, drain=False)
        await media.bus.publish(subjects.assign("ingest"), leave)
        await asyncio.sleep(0.8)
        assert media.ingest.streams == ()
        assert media.chunks == []
        assert media.ingest._closed_subs == {}
