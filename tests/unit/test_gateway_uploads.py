"""Uploads at once: slots by tenant, bodies that do not come, and what all of a tenant's may have together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from services.gateway import files
from services.gateway.app import Parts, build_api
from services.gateway.errors import BusyError, GatewayError, SlowError, TooLargeError
from services.gateway.files import MAX_AT_ONCE, Folder, Uploads
from services.gateway.settings import Settings
from shared.bus.memory import MemoryBroker, MemoryBus
from shared.contracts.views import FileView
from shared.session.memory import MemoryStore

MP4 = b"\x00\x00\x00\x18ftypisom" + b"\0" * 600


class Sender:
    """A client whose pieces come when the test says so; ``done`` ends the body."""

    def __init__(self, uploads: Uploads, tenant: str = "acme") -> None:
        self.pieces: asyncio.Queue[bytes | None] = asyncio.Queue()
        self.task: asyncio.Task[FileView] = asyncio.create_task(uploads.take(tenant, "a.mp4", None, self._body()))

    async def _body(self) -> AsyncIterator[bytes]:
        while (piece := await self.pieces.get()) is not None:
            yield piece

    async def send(self, *pieces: bytes | None) -> None:
        for piece in pieces:
            self.pieces.put_nowait(piece)
        await asyncio.sleep(0.05)

    async def outcome(self) -> FileView | BaseException:
        (made,) = await asyncio.wait_for(asyncio.gather(self.task, return_exceptions=True), 5)
        return made


def uploads_of(tmp_path: Path, max_bytes: int = 10_000, tenant_bytes: int = 15_000) -> Uploads:
    return Uploads(Folder(tmp_path, "uploads"), max_bytes, tenant_bytes)


async def test_stuck_clients_hold_their_own_tenants_slots_only(tmp_path: Path) -> None:
    uploads = uploads_of(tmp_path)
    burst = [Sender(uploads) for _ in range(MAX_AT_ONCE + 3)]
    await asyncio.sleep(0.05)
    refused = [await each.outcome() for each in burst if each.task.done()]
    assert [type(each) for each in refused] == [BusyError] * 3, "a slot is taken before anything is awaited"
    other = Sender(uploads, "other")
    await other.send(MP4, None)
    assert isinstance(await other.outcome(), FileView)
    await burst[0].send(MP4, None)
    assert isinstance(await burst[0].outcome(), FileView)
    again = Sender(uploads)
    await again.send(MP4, None)
    assert isinstance(await again.outcome(), FileView), "its slot is free"
    for each in burst:
        await each.send(None)
    assert len([each for each in burst if isinstance(await each.outcome(), GatewayError)]) == MAX_AT_ONCE - 1 + 3


async def test_all_tenants_together_have_a_limit_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_IN_ALL", 2)
    uploads = uploads_of(tmp_path)
    senders = [Sender(uploads, tenant) for tenant in "abc"]
    await senders[2].send(None)
    assert isinstance(await senders[2].outcome(), BusyError)
    for each in senders:
        await each.send(MP4, None)
    assert [type(await each.outcome()) for each in senders[:2]] == [FileView, FileView]


async def test_a_body_that_does_not_come_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "PIECE_S", 0.1)
    sender = Sender(uploads_of(tmp_path))
    await sender.send(MP4)
    assert isinstance(await sender.outcome(), SlowError)
    assert not list(tmp_path.rglob("*.part"))
    bus = MemoryBus(MemoryBroker())
    parts = Parts(bus, MemoryStore(), Settings(media_dir=tmp_path))

    async def stuck() -> AsyncIterator[bytes]:
        yield MP4
        await asyncio.sleep(2)

    transport = httpx.ASGITransport(build_api(parts))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        answer = await client.post("/v1/uploads", content=stuck())
    assert (answer.status_code, answer.headers["connection"]) == (408, "close")
    assert answer.headers["content-type"] == "application/problem+json"
    assert "nothing came" in answer.json()["detail"]
    await bus.close()


async def test_a_burst_stays_below_what_a_tenant_may_have(tmp_path: Path) -> None:
    uploads = uploads_of(tmp_path)
    first, second = Sender(uploads), Sender(uploads)
    await first.send(MP4 + b"x" * 5_000)
    await second.send(MP4)
    await first.send(b"x" * 4_000, None)
    assert isinstance(await first.outcome(), FileView)
    await second.send(b"x" * 6_000)
    assert isinstance(await second.outcome(), TooLargeError), "the first one's file counts, though it came later"
    assert (await uploads.list("acme")).bytes == len(MP4) + 9_000
    assert not list(tmp_path.rglob("*.part"))


async def test_what_is_deleted_meanwhile_makes_room(tmp_path: Path) -> None:
    uploads, folder = uploads_of(tmp_path), Folder(tmp_path, "uploads")
    first = Sender(uploads)
    await first.send(MP4 + b"x" * 9_000, None)
    made = await first.outcome()
    assert isinstance(made, FileView)
    second = Sender(uploads)
    await second.send(MP4)
    await folder.delete("acme", made.name)
    await second.send(b"x" * 9_000, None)
    assert isinstance(await second.outcome(), FileView)
