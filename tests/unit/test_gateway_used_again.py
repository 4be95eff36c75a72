"""An id that is used again: nothing of the stream before it is the new one's."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from services.gateway.app import Parts, build_api
from services.gateway.hls import drop_hls
from services.gateway.settings import Settings
from services.gateway.watching import Told, Watch
from shared.bus.memory import MemoryBroker, MemoryBus
from shared.bus.port import Received
from shared.contracts import subjects
from shared.contracts.commands import StartStream
from shared.contracts.events import ChunkClosed, EventKind, LedgerTotals, StreamEvent
from shared.contracts.sinks import SinkFigures
from shared.contracts.tiers import Promise, Tier
from shared.contracts.views import LiveStats
from shared.session.memory import MemoryStore
from shared.session.port import ENDED_TTL_S
from shared.session.state import StreamState

PROMISE = Promise(fps=8.0, latency_ms=400.0, tier=Tier(steps=1, fps=8.0, width=64, height=64))
HOUR_NS = int(ENDED_TTL_S * 1e9)


def event(kind: EventKind, at_ns: int, **more: object) -> StreamEvent:
    return StreamEvent.model_validate({"stream": "mine", "event": kind, "service": "egress", "at_ns": at_ns, **more})


def closed(epoch: int, chunks: int, *sinks: SinkFigures) -> ChunkClosed:
    totals = LedgerTotals(frames_in=4 * chunks, on_time=4 * chunks)
    return ChunkClosed(
        stream="mine", epoch=epoch, closed_chunks=chunks, through=chunks, totals=totals, sinks=sinks or None
    )


async def say(bus: MemoryBus, *messages: StreamEvent | ChunkClosed) -> None:
    for each in messages:
        await bus.publish(subjects.stream("mine", "event" if isinstance(each, StreamEvent) else "closed"), each)
    await asyncio.sleep(0.02)


@dataclass
class Place:
    """A gateway, and a scheduler that accepts; ``on_start`` is called with each start that reaches it."""

    client: httpx.AsyncClient
    parts: Parts
    bus: MemoryBus
    store: MemoryStore
    media: Path
    on_start: Callable[[], None] = lambda: None
    before: tuple[StreamEvent, ...] = ()

    @property
    def hls(self) -> Path:
        return self.media / "hls" / "mine"

    async def begin(self, tenant: str, **body: object) -> httpx.Response:
        asked = {"id": "mine", "source": {"kind": "pattern"}, "prompt": "neon", **body}
        return await self.client.post("/v1/streams", json=asked, headers={"X-Rheocast-Tenant": tenant})

    async def end(self) -> None:
        for state in (StreamState.STOPPING, StreamState.STOPPED):
            await self.store.move("mine", state)


@pytest.fixture
async def place(tmp_path: Path) -> AsyncIterator[Place]:
    bus, store = MemoryBus(MemoryBroker()), MemoryStore()
    parts = Parts(bus, store, Settings(media_dir=tmp_path, answer_timeout_s=2.0))
    await parts.start()
    transport = httpx.ASGITransport(build_api(parts))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        made = Place(client, parts, bus, store, tmp_path)

        async def answer(received: Received) -> None:
            command: StartStream = received.message
            made.on_start()
            await store.create(command.stream, command.spec)
            for told in made.before:
                await bus.publish(subjects.stream("mine", "event"), told)
            told = event(EventKind.ACCEPTED, 50, service="scheduler", command=command.command, promise=PROMISE)
            await bus.publish(subjects.stream("mine", "event"), told)

        await bus.subscribe(subjects.stream("mine", "control"), answer)
        yield made
    await parts.close()
    await bus.close()


async def test_a_new_stream_has_nothing_of_the_one_before(place: Place) -> None:
    assert (await place.begin("a", sinks=[{"kind": "hls"}])).status_code == 201
    place.hls.mkdir(parents=True)
    (place.hls / "index.m3u8").write_text("#EXTM3U\n")
    figures = SinkFigures(id="hls-1", sink_kind="hls", frames=9)
    await say(place.bus, event(EventKind.WARNING, 60, reason="a's", epoch=2), closed(2, 30, figures))
    assert (await place.client.get("/v1/streams/mine/hls/index.m3u8")).status_code == 200
    await say(place.bus, event(EventKind.STOPPED, 70, epoch=2))
    await place.end()
    gone: list[bool] = []
    place.on_start = lambda: gone.append(not place.hls.exists())
    place.before = (event(EventKind.LISTENING, 45, service="ingest", epoch=1),)
    assert (await place.begin("b")).status_code == 201
    assert gone == [True], "before the start goes out: egress makes the folder anew"
    assert not list((place.media / "hls").iterdir())
    assert (await place.client.get("/v1/streams/mine/hls/index.m3u8")).status_code == 404
    await asyncio.sleep(0.02)
    told = [each.event.event for each in place.parts.watch.history("mine")]
    assert told == [EventKind.LISTENING, EventKind.ACCEPTED], "what was told before it was accepted is not lost"
    assert place.parts.watch.stats("mine") == LiveStats()
    assert place.parts.watch.sinks("mine") == ()
    await say(place.bus, closed(1, 3))
    assert place.parts.watch.chunk("mine") == 2, "epochs begin at 1 again where the session was forgotten"


async def test_a_stream_under_way_keeps_what_it_has_when_its_id_is_asked_for(place: Place) -> None:
    assert (await place.begin("a")).status_code == 201
    place.hls.mkdir(parents=True)
    await say(place.bus, event(EventKind.LIVE, 60, epoch=1), closed(1, 3))
    place.parts.settings.answer_timeout_s = 0.1
    assert (await place.begin("b")).status_code == 503, "nobody answers: the store knows of it"
    assert place.hls.is_dir()
    assert len(place.parts.watch.history("mine")) == 2
    assert place.parts.watch.chunk("mine") == 2


@pytest.mark.parametrize(
    ("began", "old_epoch", "kept"),
    [
        ([event(EventKind.LIVE, 9, epoch=3)], 2, ["live"]),
        ([event(EventKind.LIVE, 9 + HOUR_NS, epoch=1)], 2, ["live"]),
        (
            [event(EventKind.LISTENING, 9, epoch=3), event(EventKind.ACCEPTED, 10, promise=PROMISE)],
            2,
            ["listening", "accepted"],
        ),
        ([event(EventKind.ACCEPTED, 9, promise=PROMISE), event(EventKind.LIVE, 10, epoch=3)], 2, ["accepted", "live"]),
        ([event(EventKind.FAILED, 9, epoch=3)], 2, ["failed"]),
        ([event(EventKind.WARNING, 9, epoch=2)], 2, ["applied", "stopped", "warning"]),
        ([event(EventKind.REFUSED, 9)], 2, ["applied", "stopped", "refused"]),
        ([event(EventKind.WARNING, 9, epoch=2)], 0, ["applied", "stopped", "warning"]),
    ],
)
async def test_a_gateway_that_was_not_asked_sees_where_a_new_stream_begins(
    began: list[StreamEvent], old_epoch: int, kept: list[str]
) -> None:
    bus = MemoryBus(MemoryBroker())
    watch = Watch(bus)
    await watch.start()
    await say(
        bus, event(EventKind.APPLIED, 1, epoch=old_epoch), closed(2, 5), event(EventKind.STOPPED, 2, epoch=old_epoch)
    )
    await say(bus, *began)
    later = Watch(bus)  # after a restart the broker's events come again
    await later.start()
    await asyncio.sleep(0.02)
    for each in (watch, later):
        assert [told.event.event.value for told in each.history("mine")] == kept
    assert (watch.chunk("mine") == -1) == ("stopped" not in kept)
    await bus.close()


async def test_who_follows_goes_on_with_the_new_stream() -> None:
    bus = MemoryBus(MemoryBroker())
    watch = Watch(bus)
    await watch.start()
    await say(bus, event(EventKind.REFUSED, 1))
    following = watch.follow("mine", None)
    first = asyncio.ensure_future(anext(following))
    await asyncio.sleep(0.01)
    watch.begin("mine")
    assert watch.history("mine") == []
    await say(bus, event(EventKind.LISTENING, 5, epoch=1))
    told = await asyncio.wait_for(first, 2)
    assert isinstance(told, Told)
    assert told.event.at_ns == 5
    await following.aclose()  # type: ignore[attr-defined]
    await bus.close()


async def test_only_the_folder_of_the_id_is_removed(tmp_path: Path) -> None:
    await drop_hls(tmp_path, "mine")
    elsewhere = tmp_path / "uploads"
    elsewhere.mkdir()
    (elsewhere / "in.mp4").write_bytes(b"x")
    hls = tmp_path / "hls"
    (hls / "other").mkdir(parents=True)
    (hls / "mine").symlink_to(elsewhere)
    await drop_hls(tmp_path, "mine")
    for odd in ("..", ".", "", "../uploads", "/etc"):
        await drop_hls(tmp_path, odd)
    assert (elsewhere / "in.mp4").exists(), "a link goes, not what it leads to"
    assert [path.name for path in hls.iterdir()] == ["other"]
    outside = tmp_path / "outside"
    (outside / "mine").mkdir(parents=True)
    media = tmp_path / "media"
    media.mkdir()
    (media / "hls").symlink_to(outside)
    await drop_hls(media, "mine")
    assert (outside / "mine").is_dir()
