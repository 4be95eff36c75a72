"""GET /v1/streams/{id}/trace: what the gateway heard of a chunk is what it tells, and a chunk that was lost is told too."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import cast
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest
from pydantic import ValidationError

from services.gateway.app import Parts, build_api
from services.gateway.chunks import MAX_STREAMS, Chunks
from services.gateway.settings import Settings
from shared.access import Role, add_token, new_token
from shared.bus.memory import MemoryBroker, MemoryBus
from shared.bus.port import Bus, BusUnavailableError, Handler, Subscription
from shared.contracts import subjects
from shared.contracts.commands import StreamSpec
from shared.contracts.events import (
    ChunkClosed,
    ChunkDropped,
    ChunkEnd,
    ChunkStamp,
    FramesDecoded,
    FrameStamp,
    LedgerTotals,
    Verdict,
)
from shared.contracts.timing import timing_of
from shared.session.memory import MemoryStore
from tests.support.messages import ref
from tests.support.messages import stamp as stamp_of

MS = 1_000_000
T0 = 1_700_000_000 * 10**9
TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = f"00-{TRACE}-b7ad6b7169203331-01"


@pytest.fixture
async def gateway(tmp_path: Path) -> AsyncIterator[tuple[httpx.AsyncClient, Parts, MemoryBus]]:
    bus, store = MemoryBus(MemoryBroker()), MemoryStore()
    parts = Parts(bus, store, Settings(media_dir=tmp_path, jaeger_url="https://jaeger.example/"))
    await parts.start()
    await store.create("a", StreamSpec.model_validate({"source": {"kind": "pattern"}, "prompt": "neon"}))
    transport = httpx.ASGITransport(build_api(parts))
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:7860") as client:
        yield client, parts, bus
    await parts.close()
    await bus.close()


def stamp(chunk: int, trace: str = PARENT) -> ChunkStamp:
    frames = tuple(FrameStamp(index=n, pts=n, captured_ns=T0 + n * 40 * MS) for n in range(4))
    return stamp_of("a", chunk, trace=trace, frames=frames, begun_ns=T0 + 125 * MS, published_ns=T0 + 127 * MS)


async def test_a_chunk_is_told_from_capture_to_verdict(
    gateway: tuple[httpx.AsyncClient, Parts, MemoryBus],
) -> None:
    client, _, bus = gateway
    first = (await client.get("/v1/streams/a/trace")).json()
    assert (first["stream"], first["chunks"]) == ("a", [])
    encode = timing_of("encode", T0 + 127 * MS, T0 + 130 * MS, T0 + 134 * MS, 20.0, instance="worker-0")
    stage = timing_of("stage", encode.end_ns, T0 + 160 * MS, T0 + 160 * MS, 30.0, pipeline="p0", stage=0)
    egress = timing_of("egress", stage.end_ns, T0 + 191 * MS, T0 + 230 * MS, 120.0)
    shown = FramesDecoded(stamp=stamp(1), pixels=ref(), steps=1, prompt_version=1, timings=(encode, stage))
    given_up = ChunkDropped(stamp=stamp(2, ""), service="scheduler", reason="stale", timings=(encode,))
    for message in (shown, given_up):
        await bus.publish(subjects.stream("a", "frames"), message)
    late = ChunkEnd(chunk=1, verdict=Verdict.LATE, closed_ns=egress.end_ns, captured_ns=T0, trace=PARENT, egress=egress)
    waited = timing_of("egress", encode.end_ns, encode.end_ns, T0 + 200 * MS)
    dropped = ChunkEnd(
        chunk=2, verdict=Verdict.DROPPED, closed_ns=T0 + 200 * MS, reason="scheduler:stale", egress=waited
    )
    lost = ChunkEnd(chunk=3, verdict=Verdict.DROPPED, closed_ns=T0 + 9000 * MS, captured_ns=T0, reason="egress:lost")
    totals = LedgerTotals(frames_in=12, late=4, dropped={"scheduler:stale": 4, "egress:lost": 4})
    await bus.publish(
        subjects.stream("a", "closed"),
        ChunkClosed(stream="a", epoch=1, closed_chunks=4, through=4, totals=totals, ends=(late, dropped, lost)),
    )
    await asyncio.sleep(0.05)
    told = (await client.get("/v1/streams/a/trace")).json()
    one, two, three = told["chunks"]
    assert (one["chunk"], one["verdict"], one["trace_id"], one["frames"]) == (1, "late", TRACE, 4)
    assert (one["begin_ns"], one["end_ns"]) == (T0, T0 + 350 * MS)
    assert one["jaeger_url"] == f"https://jaeger.example/trace/{TRACE}"
    assert [(hop["hop"], hop["wait_ms"], hop["duration_ms"]) for hop in one["hops"]] == [
        ("capture", 0.0, 120.0),
        ("ingest", 5.0, 2.0),
        ("encode", 7.0, 20.0),
        ("stage", 6.0, 30.0),
        ("egress", 40.0, 120.0),
    ]
    ends = [hop["begin_ns"] + round(hop["duration_ms"] * MS) for hop in one["hops"]]
    begins = [hop["begin_ns"] - round(hop["wait_ms"] * MS) for hop in one["hops"]]
    assert begins == [T0, *ends[:-1]], "each hop's wait begins where the hop before ended"
    assert (one["hops"][3]["pipeline"], one["hops"][3]["stage"], one["hops"][2]["instance"]) == ("p0", 0, "worker-0")
    assert (two["verdict"], two["reason"], two["trace_id"], two["jaeger_url"]) == (
        "dropped",
        "scheduler:stale",
        "",
        None,
    )
    assert [hop["hop"] for hop in two["hops"]] == ["capture", "ingest", "encode", "egress"]
    assert (three["chunk"], three["reason"], three["begin_ns"], three["hops"]) == (3, "egress:lost", T0, [])
    found = urlsplit(told["jaeger_url"])
    assert (found.netloc, found.path) == ("jaeger.example", "/search")
    assert parse_qs(found.query)["tags"] == ['{"stream.id": "a"}']


async def test_a_new_stream_of_the_same_id_has_none_of_the_olds_chunks(
    gateway: tuple[httpx.AsyncClient, Parts, MemoryBus],
) -> None:
    client, _, bus = gateway
    await client.get("/v1/streams/a/trace")
    for chunk in (70, 0):
        message = FramesDecoded(stamp=stamp(chunk), pixels=ref(), steps=1, prompt_version=1)
        await bus.publish(subjects.stream("a", "frames"), message)
    await asyncio.sleep(0.05)
    assert [each["chunk"] for each in (await client.get("/v1/streams/a/trace")).json()["chunks"]] == [0]


async def test_a_question_that_nats_could_not_be_asked_for_is_asked_anew(
    gateway: tuple[httpx.AsyncClient, Parts, MemoryBus], monkeypatch: pytest.MonkeyPatch
) -> None:
    client, _, bus = gateway

    async def away(*_: object) -> None:
        raise BusUnavailableError("NATS is away")

    with monkeypatch.context() as outage:
        outage.setattr(bus, "subscribe", away)
        assert (await client.get("/v1/streams/a/trace")).status_code == 503
    assert (await client.get("/v1/streams/a/trace")).status_code == 200
    await bus.publish(
        subjects.stream("a", "frames"), FramesDecoded(stamp=stamp(1), pixels=ref(), steps=1, prompt_version=1)
    )
    await asyncio.sleep(0.05)
    assert [each["chunk"] for each in (await client.get("/v1/streams/a/trace")).json()["chunks"]] == [1]


async def test_a_stream_that_is_forgotten_before_it_is_heard_costs_no_subscription() -> None:
    bus = MemoryBus(MemoryBroker())
    chunks, going_on, begun, left = Chunks(bus), asyncio.Event(), asyncio.Event(), list[str]()

    class Slow:
        """The bus, with a first subscription that takes its time."""

        async def subscribe(self, pattern: str, handler: Handler) -> Subscription:
            begun.set()
            await going_on.wait()
            subscription = await bus.subscribe(pattern, handler)
            gone = subscription.unsubscribe

            async def unsubscribe() -> None:
                left.append(pattern)
                await gone()

            monkey = SimpleNamespace(unsubscribe=unsubscribe, drain=subscription.drain)
            return cast(Subscription, monkey)

    chunks._bus = cast(Bus, Slow())
    first = asyncio.create_task(chunks.of("first"))
    await begun.wait()
    chunks._bus = bus
    for number in range(MAX_STREAMS):
        await chunks.of(f"s{number}")
    going_on.set()
    assert (await first).chunks == []
    assert left == ["rheo.stream.first.frames"]
    await bus.close()


async def test_who_came_by_a_share_link_is_not_led_to_jaeger(tmp_path: Path) -> None:
    bus, store = MemoryBus(MemoryBroker()), MemoryStore()
    _, entry = new_token("someone", Role.OPERATOR, "default")
    add_token(tmp_path / "tokens.json", entry)
    settings = Settings(media_dir=tmp_path, jaeger_url="http://jaeger:16686", tokens_file=tmp_path / "tokens.json")
    parts = Parts(bus, store, settings)
    await parts.start()
    await store.create("a", StreamSpec.model_validate({"source": {"kind": "pattern"}, "prompt": "neon"}))
    shared = await parts.shares.make("a", "default", 60.0)
    transport = httpx.ASGITransport(build_api(parts), client=("10.0.0.9", 5))
    headers = {"Authorization": f"Bearer {shared.token}"}
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:7860", headers=headers) as client:
        assert (await client.get("/v1/streams/a/trace")).status_code == 200
        message = FramesDecoded(stamp=stamp(5), pixels=ref(), steps=1, prompt_version=1)
        await bus.publish(subjects.stream("a", "frames"), message)
        await asyncio.sleep(0.05)
        told = (await client.get("/v1/streams/a/trace")).json()
        assert (told["jaeger_url"], told["chunks"][0]["jaeger_url"]) == (None, None)
        assert told["chunks"][0]["trace_id"] == TRACE
        assert (await client.get("/v1/streams/b/trace")).status_code == 404
        unknown = await client.get("/v1/streams/a/trace", headers={"Authorization": ""})
        assert unknown.status_code == 401
    await parts.close()
    await bus.close()


@pytest.mark.parametrize("url", ["javascript:alert(1)", "jaeger:16686", "http://a b"])
def test_an_odd_jaeger_address_is_refused(url: str) -> None:
    with pytest.raises(ValidationError, match="jaeger_url"):
        Settings(jaeger_url=url)
