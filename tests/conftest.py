"""Fixtures that every test may use. Nothing here is started unless a test asks for it."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from shared.bus.nats import NatsBus
from shared.embedded import EmbeddedServers
from shared.session.redis import RedisStore
from shared.tensors.shm import sweep_run
from tests.support.servers import embedded

SHM_DIR = Path("/dev/shm")


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServers]:
    """A nats-server and a redis-server, shared by the session."""
    with embedded(tmp_path_factory.mktemp("servers")) as running:
        yield running


@pytest.fixture(scope="session")
def nats_url(servers: EmbeddedServers) -> str:
    return servers.nats_url


@pytest.fixture(scope="session")
def redis_url(servers: EmbeddedServers) -> str:
    return servers.redis_url


@pytest.fixture
async def nats_bus(nats_url: str) -> AsyncIterator[NatsBus]:
    bus = await NatsBus.connect(nats_url)
    yield bus
    await bus.close()


@pytest.fixture
async def redis_store(redis_url: str) -> AsyncIterator[RedisStore]:
    """A store of its own: its keys have a prefix that no other test uses."""
    store = await RedisStore.connect(redis_url, prefix=f"test-{uuid.uuid4().hex[:8]}:")
    yield store
    await store.close()


@pytest.fixture
def run_id() -> Iterator[str]:
    """A run whose shared memory is gone after the test."""
    run = f"test{uuid.uuid4().hex[:8]}"
    yield run
    sweep_run(SHM_DIR, run)
