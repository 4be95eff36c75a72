"""A body counts by its bytes: announced or not, more than the limit is 413 and never reaches a route."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator

import httpx
import pytest

from services.gateway.app import Parts, build_api
from services.gateway.settings import Settings
from shared.bus.memory import MemoryBroker, MemoryBus
from shared.session.memory import MemoryStore

LIMIT = 1000


@pytest.fixture
async def client() -> AsyncIterator[httpx.AsyncClient]:
    settings = Settings(max_body_bytes=LIMIT)
    bus = MemoryBus(MemoryBroker())
    api = build_api(Parts(bus, MemoryStore(), settings))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(api), base_url="http://localhost") as made:
        yield made
    await bus.close()


async def chunked(size: int, taken: list[int] | None = None) -> AsyncIterator[bytes]:
    """Valid JSON of ``size`` bytes in small pieces, so that no length is announced."""
    body = json.dumps({"prompt": "x"}).encode().ljust(size)
    for start in range(0, size, 100):
        if taken is not None:
            taken.append(start)
        yield body[start : start + 100]


async def test_a_chunked_body_over_the_limit_is_refused_and_not_read_to_its_end(client: httpx.AsyncClient) -> None:
    taken: list[int] = []
    answer = await client.post("/v1/streams", content=chunked(1_000_000, taken))
    assert "content-length" not in answer.request.headers
    assert answer.status_code == 413
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["detail"] == f"a body may have {LIMIT} bytes"
    assert len(taken) <= LIMIT / 100 + 2


async def test_an_announced_body_over_the_limit_is_refused(client: httpx.AsyncClient) -> None:
    answer = await client.post("/v1/streams", content=b" " * (LIMIT + 1))
    assert answer.request.headers["content-length"] == str(LIMIT + 1)
    assert answer.status_code == 413


async def test_a_chunked_body_at_the_limit_reaches_its_route_whole(client: httpx.AsyncClient) -> None:
    answer = await client.post("/v1/streams", content=chunked(LIMIT), headers={"content-type": "application/json"})
    assert answer.status_code == 422, "it was read: the source is missing"
    assert "source" in answer.json()["detail"]


async def test_a_request_without_a_body_passes(client: httpx.AsyncClient) -> None:
    assert (await client.get("/healthz")).json() == {"status": "ok"}
