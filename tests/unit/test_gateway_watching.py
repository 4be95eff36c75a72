"""Events, receipts and figures as the gateway keeps them; paging and idempotency of its streams."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from services.gateway.app import Parts, build_api
from services.gateway.settings import Settings
from services.gateway.watching import FOLLOWER_EVENTS, MAX_EVENTS, Told, Watch, since
from shared.bus.memory import MemoryBroker, MemoryBus
from shared.contracts import subjects
from shared.contracts.commands import StartStream, StreamSpec
from shared.contracts.events import (
    ChunkClosed,
    ChunkStamp,
    EventKind,
    FramesDecoded,
    FrameStamp,
    LedgerTotals,
    StageTiming,
    StreamEvent,
)
from shared.contracts.refs import TensorPlace, TensorRef
from shared.contracts.views import LiveStats
from shared.session.memory import MemoryStore
from shared.session.state import StreamState


def event(kind: EventKind, at_ns: int, **more: object) -> StreamEvent:
    return StreamEvent.model_validate({"stream": "a", "event": kind, "service": "scheduler", "at_ns": at_ns, **more})


async def tell(bus: MemoryBus, *events: StreamEvent) -> None:
    for each in events:
        await bus.publish(subjects.stream(each.stream, "event"), each)
    await asyncio.sleep(0.02)


async def watch_of(bus: MemoryBus) -> Watch:
    watch = Watch(bus)
    await watch.start()
    await asyncio.sleep(0.01)
    return watch


async def test_a_receipt_is_accepted_then_applied_and_survives_a_restart() -> None:
    bus = MemoryBus(MemoryBroker())
    watch = await watch_of(bus)
    await tell(bus, event(EventKind.ACCEPTED, 1, command="c", version=2))
    assert (watch.receipt("a", "c").state, watch.receipt("a", "c").chunk) == ("accepted", -1)
    await tell(bus, event(EventKind.APPLIED, 2, command="c", version=2, chunk=7, pts=70, until_chunk=9))
    for each in (watch, await watch_of(bus)):  # a new gateway hears what the broker kept
        seen = each.receipt("a", "c")
        assert (seen.state, seen.version, seen.chunk, seen.pts, seen.until_chunk) == ("applied", 2, 7, 70, 9)
    await bus.close()


async def test_followers_go_on_after_the_last_event_they_saw() -> None:
    bus = MemoryBus(MemoryBroker())
    watch = await watch_of(bus)
    await tell(bus, *(event(EventKind.APPLIED, n, chunk=n) for n in (1, 2, 3)))
    ids = [told.id for told in watch.history("a")]
    got: list[Told] = []

    async def follow() -> None:
        async for told in watch.follow("a", ids[0]):
            assert isinstance(told, Told)
            got.append(told)

    task = asyncio.create_task(follow())
    await asyncio.sleep(0.01)
    await tell(bus, event(EventKind.STOPPED, 4))
    await asyncio.wait_for(task, 2)
    assert [told.event.at_ns for told in got] == [2, 3, 4], "and it ends with the stream"
    assert [told.event.at_ns for told in since(watch.history("a"), "2-forgotten")] == [3, 4]
    assert len(since(watch.history("a"), "nonsense")) == 4
    await bus.close()


async def test_a_slow_follower_is_let_go_and_counted_and_history_is_bounded() -> None:
    bus = MemoryBus(MemoryBroker())
    watch = await watch_of(bus)
    follower = watch.follow("a", None)
    await tell(bus, event(EventKind.APPLIED, 1))
    first = asyncio.create_task(anext(follower))
    await asyncio.sleep(0.01)
    await tell(bus, event(EventKind.APPLIED, 2))
    assert (await first).event.at_ns == 2  # type: ignore[union-attr]
    for n in range(MAX_EVENTS + FOLLOWER_EVENTS):
        await bus.publish(subjects.stream("a", "event"), event(EventKind.APPLIED, 10 + n))
    await asyncio.sleep(0.1)
    assert watch.counters["followers_dropped"] == 1
    left = [told async for told in follower]
    assert len(left) <= 1
    assert len(watch.history("a")) == MAX_EVENTS
    await bus.close()


async def test_figures_come_from_verdicts() -> None:
    bus = MemoryBus(MemoryBroker())
    watch = await watch_of(bus)
    assert watch.stats("a") == LiveStats()
    for n in range(1, 4):
        totals = LedgerTotals(frames_in=4 * n, on_time=3 * n, late=n)
        closed = ChunkClosed(stream="a", epoch=1, closed_chunks=n, through=n, totals=totals, latency_ms=100.0 * n)
        await bus.publish(subjects.stream("a", "closed"), closed)
        await asyncio.sleep(0.02)
    stats = watch.stats("a")
    assert (stats.chunk, stats.latency_ms, stats.on_time) == (2, 200.0, 0.75)
    assert stats.fps > 0
    await bus.close()


@pytest.fixture
async def gateway(tmp_path: Path) -> AsyncIterator[tuple[httpx.AsyncClient, Parts, MemoryBus, MemoryStore]]:
    bus, store = MemoryBus(MemoryBroker()), MemoryStore()
    parts = Parts(bus, store, Settings(media_dir=tmp_path, answer_timeout_s=2.0))
    await parts.start()
    transport = httpx.ASGITransport(build_api(parts))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        yield client, parts, bus, store
    await parts.close()
    await bus.close()


async def test_the_same_key_starts_one_stream(
    gateway: tuple[httpx.AsyncClient, Parts, MemoryBus, MemoryStore],
) -> None:
    client, _, bus, store = gateway
    started: list[str] = []

    async def answer(received: object) -> None:
        command: StartStream = received.message  # type: ignore[attr-defined]
        started.append(command.stream)
        await store.create(command.stream, command.spec)
        kind = EventKind.ACCEPTED if command.spec.prompt != "no" else EventKind.REFUSED
        told = StreamEvent(stream=command.stream, event=kind, service="scheduler", at_ns=1, command=command.command)
        await bus.publish(subjects.stream(command.stream, "event"), told)

    await bus.subscribe(subjects.stream(subjects.ANY, "control"), answer)
    body = {"source": {"kind": "pattern"}, "prompt": "neon"}
    key = {"Idempotency-Key": "once"}
    first = await client.post("/v1/streams", json=body, headers=key)
    assert first.status_code == 201, first.text
    again = await client.post("/v1/streams", json=body, headers=key)
    assert (again.status_code, again.json(), again.headers["location"]) == (
        201,
        first.json(),
        first.headers["location"],
    )
    assert started == [first.json()["id"]]
    other = await client.post("/v1/streams", json={**body, "prompt": "ink"}, headers=key)
    assert other.status_code == 422
    assert "new key" in other.json()["detail"]
    mine = {**key, "X-Rheocast-Tenant": "acme"}
    assert (await client.post("/v1/streams", json=body, headers=mine)).json()["id"] != started[0], (
        "keys are a tenant's own"
    )
    for _ in range(2):  # a refusal is not kept: the second try asks again
        refused = await client.post("/v1/streams", json={**body, "prompt": "no"}, headers={"Idempotency-Key": "two"})
        assert refused.status_code == 409
    assert len(started) == 4


async def test_streams_are_listed_a_page_at_a_time(
    gateway: tuple[httpx.AsyncClient, Parts, MemoryBus, MemoryStore],
) -> None:
    client, _, _, store = gateway
    for name in "abcde":
        await store.create(name, StreamSpec.model_validate({"source": {"kind": "pattern"}, "prompt": "neon"}))
    await store.move("b", StreamState.LIVE)
    page = (await client.get("/v1/streams", params={"limit": 2})).json()
    assert ([s["id"] for s in page["streams"]], page["next"]) == (["a", "b"], "b")
    page = (await client.get("/v1/streams", params={"limit": 3, "after": "b"})).json()
    assert ([s["id"] for s in page["streams"]], page["next"]) == (["c", "d", "e"], None)
    live = (await client.get("/v1/streams", params={"state": ["live", "failed"]})).json()
    assert [s["id"] for s in live["streams"]] == ["b"]
    assert (await client.get("/v1/streams", params={"state": "odd"})).status_code == 422


async def test_chunks_are_heard_once_somebody_asks(
    gateway: tuple[httpx.AsyncClient, Parts, MemoryBus, MemoryStore],
) -> None:
    client, _, bus, store = gateway
    await store.create("a", StreamSpec.model_validate({"source": {"kind": "pattern"}, "prompt": "neon"}))
    assert (await client.get("/v1/streams/a/chunks")).json() == {"chunks": []}
    for n in range(60):
        frames = (FrameStamp(index=n, pts=n, captured_ns=5),)
        stamp = ChunkStamp(stream="a", epoch=1, chunk=n, frames=frames, published_ns=6)
        pixels = TensorRef(owner="w", host="h", place=TensorPlace.SHM, shape=(1,), dtype="uint8")
        timings = (StageTiming(hop="encode", queue_ms=1.0, compute_ms=2.0),)
        message = FramesDecoded(stamp=stamp, pixels=pixels, steps=2, prompt_version=1, timings=timings)
        await bus.publish(subjects.stream("a", "frames"), message)
    closed = ChunkClosed(stream="a", epoch=1, closed_chunks=20, through=20, totals=LedgerTotals())
    await asyncio.sleep(0.05)
    await bus.publish(subjects.stream("a", "closed"), closed)
    await asyncio.sleep(0.05)
    chunks = (await client.get("/v1/streams/a/chunks")).json()["chunks"]
    assert [each["chunk"] for each in chunks] == list(range(10, 60))
    unknown = {"begin_ns": 0, "transfer_ms": 0.0, "instance": "", "pipeline": "", "stage": -1}
    assert chunks[0]["hops"] == [{"hop": "encode", "queue_ms": 1.0, "compute_ms": 2.0, **unknown}]
    assert (chunks[9]["closed_ns"] > 0, chunks[10]["closed_ns"]) == (True, 0)
    assert chunks[0]["decoded_ns"] > 0


async def test_a_browser_is_told_not_to_come_back_to_a_stream_that_ended(
    gateway: tuple[httpx.AsyncClient, Parts, MemoryBus, MemoryStore],
) -> None:
    client, _, bus, store = gateway
    await store.create("a", StreamSpec.model_validate({"source": {"kind": "pattern"}, "prompt": "neon"}))
    await tell(bus, event(EventKind.APPLIED, 1), event(EventKind.STOPPED, 2, command="c"))
    for state in (StreamState.STOPPING, StreamState.STOPPED):
        await store.move("a", state)
    told = await client.get("/v1/streams/a/events", headers={"Last-Event-ID": "1-scheduler"})
    assert told.headers["content-type"].startswith("text/event-stream")
    assert "event: stopped" in told.text
    assert "id: 2-scheduler" in told.text
    again = await client.get("/v1/streams/a/events", headers={"Last-Event-ID": "2-scheduler"})
    assert (again.status_code, again.content) == (204, b"")
    assert (await client.get("/v1/streams/a/receipts/c")).json()["state"] == "stopped"
    assert (await client.get("/v1/streams/a/receipts/none")).status_code == 404
