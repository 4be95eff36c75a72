"""Pictures for viewers, uploads, recordings, sinks and HLS files, at the gateway alone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from services.gateway.api.media import MAX_PUSHED_BYTES, refusal_of, with_token
from services.gateway.app import Parts, build_api
from services.gateway.errors import NoAnswerError
from services.gateway.files import kind_of, safe_name
from services.gateway.settings import Settings
from services.gateway.sink_book import shown
from services.gateway.viewing import Viewing
from services.scheduler.messenger import Messenger
from services.scheduler.records import Phase, StreamRecord
from services.scheduler.settings import Settings as SchedulerSettings
from services.scheduler.sinking import Sinking
from shared.bus.memory import MemoryBroker, MemoryBus
from shared.bus.port import Received
from shared.clock import SystemClock
from shared.contracts import subjects
from shared.contracts.commands import StreamSpec
from shared.contracts.events import ChunkClosed, EventKind, LedgerTotals, StreamEvent
from shared.contracts.sinks import (
    AddSink,
    FramePublished,
    HlsSink,
    Looking,
    Mp4Sink,
    RemoveSink,
    RtmpSink,
    SinkFigures,
    named,
)
from shared.session.memory import MemoryStore

MP4 = b"\x00\x00\x00\x18ftypisom" + b"\0" * 600


def frame(n: int, stream: str = "a", kind: str = "jpeg") -> FramePublished:
    return FramePublished.model_validate(
        {
            "stream": stream,
            "chunk": n,
            "pts": n,
            "captured_ns": n,
            "shown_ns": n,
            "format": kind,
            "width": 16,
            "height": 16,
            "data": b"\xff\xd8\xff" + bytes([n % 256]),
        }
    )


async def publish(bus: MemoryBus, *frames: FramePublished) -> None:
    for each in frames:
        await bus.publish(subjects.stream(each.stream, "out"), each)
        await asyncio.sleep(0.005)


async def test_fifty_viewers_are_one_subscription_and_the_slow_miss_pictures() -> None:
    bus = MemoryBus(MemoryBroker())
    viewing, looked = Viewing(bus, 100), list[Looking]()

    async def look(received: Received) -> None:
        looked.append(received.message)

    await bus.subscribe(subjects.stream("a", "looking"), look)
    got: dict[int, list[int]] = {n: [] for n in range(50)}

    async def view(n: int) -> None:
        async for picture in viewing.pictures("a"):
            got[n].append(picture.captured_ns)
            if n == 0:
                await asyncio.sleep(0.05)  # the slow one

    tasks = [asyncio.create_task(view(n)) for n in range(50)]
    await asyncio.sleep(0.05)
    before = bus.stats.of(subjects.stream("a", "out")).received
    await publish(bus, *(frame(n) for n in range(20)), frame(19), frame(20, kind="rgb24"))
    await asyncio.sleep(0.1)
    assert bus.stats.of(subjects.stream("a", "out")).received - before == 22
    assert viewing.viewers("a") == 50
    assert len(looked) == 1, "said once for all, every two seconds"
    assert viewing.counters["pictures"] == 20, "a picture that comes twice, or is no JPEG, is not shown"
    assert got[1] == list(range(20))
    assert 0 < len(got[0]) < 20
    assert got[0][-1] == 19, "the newest wins"
    assert viewing.counters["missed"] == 20 - len(got[0])
    viewing.ended("a")
    await asyncio.wait_for(asyncio.gather(*tasks), 2)
    assert viewing.viewers("a") == 0
    await viewing.close()
    await bus.close()


async def test_a_snapshot_waits_and_says_when_nothing_comes() -> None:
    bus = MemoryBus(MemoryBroker())
    viewing = Viewing(bus, 1)
    snap = asyncio.create_task(viewing.snapshot("a"))
    await asyncio.sleep(0.02)
    await publish(bus, frame(7))
    assert (await snap).captured_ns == 7
    with pytest.raises(NoAnswerError, match="paused"):
        await viewing.snapshot("a", within_s=0.05)
    await viewing.close()
    await bus.close()


async def test_who_comes_at_the_end_of_a_feeds_time_is_shown_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.gateway.viewing.LINGER_S", 0.6)
    bus = MemoryBus(MemoryBroker())
    viewing = Viewing(bus, 2)
    with pytest.raises(NoAnswerError):
        await viewing.snapshot("a", within_s=0.01)
    await asyncio.sleep(2.0 + 0.5)  # it looks for 2 s, then lingers: the last third
    late = asyncio.create_task(viewing.snapshot("a", within_s=2.0))
    await asyncio.sleep(0.3)
    await publish(bus, frame(3))
    assert (await late).captured_ns == 3
    await viewing.close()
    await bus.close()


@dataclass
class Studio:
    """A gateway, and the scheduler's part that keeps sinks."""

    client: httpx.AsyncClient
    parts: Parts
    bus: MemoryBus
    media: Path
    commands: list[AddSink | RemoveSink] = field(default_factory=list[AddSink | RemoveSink])


@pytest.fixture
async def studio(tmp_path: Path) -> AsyncIterator[Studio]:
    bus, store = MemoryBus(MemoryBroker()), MemoryStore()
    settings = Settings(media_dir=tmp_path, answer_timeout_s=2.0, upload_max_bytes=10_000, upload_tenant_bytes=15_000)
    parts = Parts(bus, store, settings)
    await parts.start()
    spec = {"source": {"kind": "pattern"}, "prompt": "neon", "sinks": [{"kind": "null"}, {"kind": "hls"}]}
    await store.create("a", StreamSpec.model_validate(spec))
    transport = httpx.ASGITransport(build_api(parts))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        made = Studio(client, parts, bus, tmp_path)

        messenger = Messenger(SchedulerSettings(), bus, SystemClock())
        record = StreamRecord("a", 1, StreamSpec.model_validate(spec), 64, 64, 0.5, phase=Phase.RUNNING)
        sinking = Sinking(bus, store, messenger, {"a": record})

        async def answer(received: Received) -> None:
            made.commands.append(received.message)
            await sinking.change(received.message)

        async def hear(received: Received) -> None:
            if received.message.gone:
                await sinking.on_gone(received.message)

        await bus.subscribe(subjects.stream("a", "control"), answer)
        await bus.subscribe(subjects.stream("a", "event"), hear)
        yield made
    await parts.close()
    await bus.close()


async def test_uploads_are_confined_bounded_and_looked_at(studio: Studio) -> None:
    client = studio.client
    made = await client.post("/v1/uploads", content=MP4, headers={"X-Upload-Name": "../../etc/My walk!.MP4"})
    assert made.status_code == 201, made.text
    file = made.json()
    assert file["path"] == f"uploads/default/{file['name']}"
    assert file["name"].startswith("My-walk-")
    assert file["name"].endswith(".mp4")
    assert (studio.media / file["path"]).read_bytes() == MP4
    listed = (await client.get("/v1/uploads")).json()
    assert ([each["name"] for each in listed["files"]], listed["bytes"]) == ([file["name"]], len(MP4))
    assert (await client.get("/v1/uploads", headers={"X-Rheocast-Tenant": "other"})).json()["files"] == []
    for body, status in (
        (b"#!/bin/sh\n" + b"x" * 600, 422),
        (b"", 422),
        (b"GIF89", 422),
        (MP4 + b"x" * 10_000, 413),
    ):
        answer = await client.post("/v1/uploads", content=body)
        assert answer.status_code == status, answer.text

    async def chunks(size: int) -> AsyncIterator[bytes]:
        yield MP4
        for _ in range(size // 1000):
            yield b"x" * 1000

    assert (await client.post("/v1/uploads", content=chunks(12_000))).status_code == 413, "no length was announced"
    assert (await client.post("/v1/uploads", content=chunks(9_000))).status_code == 201
    full = await client.post("/v1/uploads", content=chunks(9_000))
    assert (full.status_code, "delete some" in full.json()["detail"]) == (413, True)
    assert not list(studio.media.rglob("*.part")), "what was refused leaves nothing"
    path = f"/v1/uploads/{file['name']}"
    assert (await client.delete(path, headers={"X-Rheocast-Tenant": "other"})).status_code == 404
    assert (await client.delete(path)).status_code == 204
    assert (await client.delete(path)).status_code == 404
    for name in ("..%2f..%2fsecret", ".hidden", "a%00b"):
        assert (await client.delete(f"/v1/uploads/{name}")).status_code in (404, 422), name


async def test_a_tenants_files_are_not_anothers_source_or_sink(studio: Studio) -> None:
    for body, word in (
        ({"source": {"kind": "file", "path": "uploads/other/a.mp4"}}, "not yours"),
        ({"source": {"kind": "file", "path": "recordings/other/a.mp4"}}, "not yours"),
        ({"sinks": [{"kind": "mp4", "path": "recordings/other/a.mp4"}]}, "recordings/default/"),
        ({"sinks": [{"kind": "mp4", "path": "uploads/default/a.mp4"}]}, "recordings/default/"),
        ({"sinks": [{"kind": "mp4", "path": "hls/a/index.mp4"}]}, "recordings/default/"),
        ({"source": {"kind": "url", "url": "file:///etc/passwd"}}, "rtsp://"),
        ({"source": {"kind": "url", "url": "concat:a|b"}}, "rtsp://"),
        ({"source": {"kind": "url", "url": "rtsp://"}}, "host"),
        ({"source": {"kind": "url", "url": "http://a b/"}}, "spaces"),
        ({"source": {"kind": "url", "url": "http://169.254.169.254/latest"}}, "RHEOCAST_ALLOW"),
        ({"source": {"kind": "url", "url": "rtsp://127.1/"}}, "RHEOCAST_ALLOW"),
        ({"source": {"kind": "url", "url": "http://localhost:6379/"}}, "RHEOCAST_ALLOW"),
        ({"sinks": [{"kind": "rtmp", "url": "rtmp://10.0.0.5/live"}]}, "RHEOCAST_ALLOW"),
        ({"sinks": [{"kind": "rtmp", "url": "http://a/"}]}, "rtmp://"),
    ):
        spec = {"source": {"kind": "pattern"}, "prompt": "neon", **body}
        answer = await studio.client.post("/v1/streams", json=spec)
        assert answer.status_code == 422, answer.text
        assert word in answer.json()["detail"]


async def test_recordings_begin_end_and_are_downloaded_in_parts(studio: Studio) -> None:
    client = studio.client
    begun = await client.post("/v1/streams/a/record")
    assert begun.status_code == 202, begun.text
    record = begun.json()
    sink = studio.commands[-1]
    assert isinstance(sink, AddSink)
    assert isinstance(sink.sink, Mp4Sink)
    assert sink.sink.path == str(studio.media / "recordings" / "default" / record["name"])
    assert (await client.post("/v1/streams/a/record")).status_code == 409
    assert (await client.get("/v1/streams/a/sinks")).json()["recording"]["name"] == record["name"]
    path = studio.media / "recordings" / "default" / record["name"]
    path.parent.mkdir(parents=True)
    path.write_bytes(bytes(range(256)))
    ended = await client.delete("/v1/streams/a/record")
    assert ended.json()["sink"] == record["sink"]
    assert isinstance(studio.commands[-1], RemoveSink)
    assert (await client.delete("/v1/streams/a/record")).status_code == 404
    url = f"/v1/recordings/{record['name']}"
    whole = await client.get(url)
    assert (whole.status_code, whole.content, whole.headers["content-type"]) == (200, bytes(range(256)), "video/mp4")
    part = await client.get(url, headers={"Range": "bytes=10-19"})
    assert (part.status_code, part.content) == (206, bytes(range(10, 20)))
    beyond = await client.get(url, headers={"Range": "bytes=900-"})
    assert (beyond.status_code, beyond.headers["content-type"]) == (416, "application/problem+json")
    assert (await client.get(url, headers={"X-Rheocast-Tenant": "other"})).status_code == 404
    assert (await client.get("/v1/recordings")).json()["bytes"] == 256
    assert (await client.delete(url)).status_code == 204


async def test_sinks_come_and_go(studio: Studio) -> None:
    client = studio.client
    assert [s["id"] for s in (await client.get("/v1/streams/a/sinks")).json()["sinks"]] == ["null-1", "hls-2"]
    added = await client.post("/v1/streams/a/sinks", json={"kind": "whep", "id": "w"})
    assert added.status_code == 202, added.text
    assert (await client.post("/v1/streams/a/sinks", json={"kind": "null", "id": "w"})).status_code == 409
    assert (await client.post("/v1/streams/a/sinks", json={"kind": "fax"})).status_code == 422
    assert (await client.delete("/v1/streams/a/sinks/hls-2")).status_code == 202
    assert (await client.delete("/v1/streams/a/sinks/hls-2")).status_code == 404
    assert [s["id"] for s in (await client.get("/v1/streams/a/sinks")).json()["sinks"]] == ["null-1", "w"]
    figures = (SinkFigures(id="null-1", sink_kind="null", frames=9), SinkFigures(id="hls-2", sink_kind="hls", frames=5))
    closed = ChunkClosed(stream="a", epoch=1, closed_chunks=1, through=1, totals=LedgerTotals(), sinks=figures)
    await studio.bus.publish(subjects.stream("a", "closed"), closed)
    await studio.bus.publish(subjects.stream("a", "closed"), closed.model_copy(update={"sinks": None}))
    warned = StreamEvent(
        stream="a",
        event=EventKind.WARNING,
        service="egress",
        at_ns=99,
        command=added.json()["command"],
        sink="w",
        gone=True,
    )
    await studio.bus.publish(subjects.stream("a", "event"), warned)
    await asyncio.sleep(0.02)
    now = (await client.get("/v1/streams/a/sinks")).json()
    assert [sink["id"] for sink in now["sinks"]] == ["null-1"], "it could not be opened"
    assert [(told["id"], told["frames"]) for told in now["figures"]] == [("null-1", 9)], "of those that are there"
    told = (await client.get("/v1/streams/a/stats")).json()["sinks"]
    assert [each["id"] for each in told] == ["null-1", "hls-2"]
    again = await client.post("/v1/streams/a/sinks", json={"kind": "null", "id": "w"})
    assert again.status_code == 202, "its id is free"


async def test_a_recording_that_broke_is_over(studio: Studio) -> None:
    client = studio.client
    begun = (await client.post("/v1/streams/a/record")).json()
    gone = StreamEvent(
        stream="a",
        event=EventKind.WARNING,
        service="egress",
        at_ns=1,
        sink=begun["sink"],
        gone=True,
        reason="disk full",
    )
    await studio.bus.publish(subjects.stream("a", "event"), gone)
    await asyncio.sleep(0.02)
    assert (await client.get("/v1/streams/a/record")).status_code == 404
    assert (await client.post("/v1/streams/a/record")).status_code == 202


def test_sinks_are_shown_without_folders_and_keys(tmp_path: Path) -> None:
    mp4, rtmp = (
        Mp4Sink(path=str(tmp_path / "recordings/a.mp4")),
        RtmpSink(url="rtmp://me:pw@live.example:1935/app/SECRET"),
    )
    assert shown(mp4, tmp_path) == Mp4Sink(path="recordings/a.mp4")
    assert shown(Mp4Sink(path="/elsewhere/b.mp4"), tmp_path) == Mp4Sink(path="b.mp4")
    assert shown(rtmp, tmp_path) == RtmpSink(url="rtmp://live.example:1935/…")
    assert [sink.id for sink in named([mp4, HlsSink(id="x"), HlsSink()])] == ["mp4-1", "x", "hls-3"]


async def test_hls_files_are_served_with_their_types_and_nothing_else(studio: Studio) -> None:
    folder = studio.media / "hls" / "a"
    folder.mkdir(parents=True)
    (folder / "index.m3u8").write_text('#EXTM3U\n#EXT-X-MAP:URI="init.mp4"\n#EXTINF:1,\nseg-1.m4s\n')
    (folder / "seg-1.m4s").write_bytes(b"abc")
    (folder / "secret.txt").write_text("no")
    (folder / "out.m3u8").symlink_to("/etc/hostname")
    base = "/v1/streams/a/hls"
    playlist = await studio.client.get(f"{base}/index.m3u8")
    assert playlist.headers["content-type"].startswith("application/vnd.apple.mpegurl")
    segment = await studio.client.get(f"{base}/seg-1.m4s")
    assert (segment.content, segment.headers["content-type"]) == (b"abc", "video/iso.segment")
    for name in ("secret.txt", "none.m4s", "out.m3u8", "", "..%2f..%2fx.m3u8", "%2e%2e"):
        assert (await studio.client.get(f"{base}/{name}")).status_code in (404, 422), name
    assert (await studio.client.get("/v1/streams/none/hls/index.m3u8")).status_code == 404


def test_a_playlist_asks_for_its_files_with_the_same_token() -> None:
    text = '#EXTM3U\n#EXT-X-MAP:URI="init.mp4"\nseg-1.m4s\n'
    assert with_token(text, "t") == '#EXTM3U\n#EXT-X-MAP:URI="init.mp4?token=t"\nseg-1.m4s?token=t\n'


@pytest.mark.parametrize(
    ("head", "kind"),
    [
        (MP4, "mp4"),
        (b"\x1a\x45\xdf\xa3....", "matroska"),
        (b"RIFF1234AVI LIST", "avi"),
        (b"RIFF1234WAVEfmt ", None),
        (b"\x47" + b"x" * 187 + b"\x47" + b"x" * 20, "mpegts"),
        (b"GIF89a", "gif"),
        (b"\xff\xd8\xff\xe0", "jpeg"),
        (b"#EXTM3U\nhttp://169.254.169.254/", None),  # a playlist would have ingest call elsewhere
        (b"ffconcat version 1.0\nfile /etc/passwd", None),
        (b"<svg", None),
        (b"", None),
    ],
)
def test_only_pictures_and_videos_are_taken(head: bytes, kind: str | None) -> None:
    assert kind_of(head) == kind


@pytest.mark.parametrize(
    ("wanted", "name"),
    [
        ("walk.mp4", "walk-m.mp4"),
        ("/etc/passwd", "passwd-m.mp4"),
        ("..", "upload-m.mp4"),
        ("a b\0c.exe", "a-b-c-m.mp4"),
        ("", "upload-m.mp4"),
        ("x" * 300 + ".mov", "x" * 60 + "-m.mov"),
        ("C:\\video\\ü.MOV", "upload-m.mov"),
    ],
)
def test_names_are_made_harmless(wanted: str, name: str) -> None:
    assert safe_name(wanted, "mp4", "m") == name


def test_frames_from_clients_are_looked_at() -> None:
    jpeg = b"\xff\xd8\xff\xe0"
    assert refusal_of(jpeg, pushes=True) == ""
    assert "push" in refusal_of(jpeg, pushes=False)
    assert "JPEG" in refusal_of(b"GIF89a", pushes=True)
    assert str(MAX_PUSHED_BYTES) in refusal_of(jpeg + b"x" * MAX_PUSHED_BYTES, pushes=True)
