"""Redis with the users that ship: each service's methods of the session store work, the others' do not."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
from redis.asyncio import Redis
from redis.exceptions import NoPermissionError, RedisError

from shared.contracts.commands import PatternSource, StreamSpec
from shared.operated.store_users import RIGHTS
from shared.session.port import StoreUnavailableError
from shared.session.redis import RedisStore
from shared.session.state import Owner, StreamState
from tests.support.operated import Operated, operated

pytestmark = pytest.mark.integration
Method = Callable[[RedisStore, str], Awaitable[Any]]


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Operated]:
    with operated(tmp_path_factory.mktemp("operated")) as running:
        yield running


def put(owner: Owner, field: str) -> Method:
    return lambda store, stream: store.put(stream, owner, {field: {}})


async def lease(store: RedisStore, name: str) -> None:
    term = await store.acquire(name, "me", 5.0)
    assert term is not None
    assert await store.renew(name, "me", term, 5.0)
    await store.release(name, "me", term)


async def note(store: RedisStore, place: str) -> None:
    await store.put_note(place, {}, 5.0)
    assert await store.get_note(place) == {}
    assert place in await store.notes(place)
    await store.drop_note(place)


async def moved(store: RedisStore, stream: str) -> None:
    for state in (StreamState.LIVE, StreamState.STOPPING, StreamState.STOPPED):
        await store.move(stream, state)


NEEDS: dict[str, list[Method]] = {
    "scheduler": [
        put(Owner.SCHEDULER, "assignment"),
        moved,
        lambda store, stream: store.get(stream),
        lambda store, stream: store.ledger(stream),
        lambda store, stream: store.streams(),
        lambda store, stream: store.put_costs("gpu", {"a": 1}),
        lambda store, stream: store.get_costs("gpu"),
        lambda store, stream: note(store, "drain/worker-0"),
        lambda store, stream: lease(store, "scheduler"),
    ],
    "gateway": [
        lambda store, stream: store.get(stream),
        lambda store, stream: store.ledger(stream),
        lambda store, stream: store.streams(),
        lambda store, stream: note(store, "share-key"),
        lambda store, stream: note(store, f"share:{stream}:x"),
        lambda store, stream: note(store, "idempotency:default:abc"),
        lambda store, stream: note(store, f"recording:{stream}"),
        lambda store, stream: note(store, f"sinks:{stream}"),
        lambda store, stream: note(store, f"timeline:{stream}"),
        lambda store, stream: note(store, "scope:default:someone"),
        lambda store, stream: lease(store, f"timeline:{stream}"),
    ],
    "ingest": [
        lambda store, stream: store.get(stream),
        lambda store, stream: store.ledger(stream),
        put(Owner.INGEST, "source"),
    ],
    "motion": [lambda store, stream: store.get(stream), put(Owner.MOTION, "controller")],
    "egress": [
        lambda store, stream: store.get(stream),
        lambda store, stream: store.ledger(stream),
        lambda store, stream: store.close_chunk(stream, 0, {"on_time": 5}),
        lambda store, stream: store.put_ledger_frames_in(stream, 5, {"ingest:rate": 1}),
        put(Owner.EGRESS, "last_chunk"),
    ],
    "worker": [
        lambda store, stream: store.put_embedding("abc", "float32", (2,), b"12345678"),
        lambda store, stream: store.get_embedding("abc"),
    ],
}
FORBIDDEN: dict[str, list[Method]] = {
    "worker": [
        lambda store, stream: store.get(stream),
        lambda store, stream: lease(store, "scheduler"),
        lambda store, stream: store.streams(),
    ],
    "motion": [
        lambda store, stream: store.ledger(stream),
        lambda store, stream: store.get_embedding("abc"),
        lambda store, stream: store.streams(),
    ],
    "ingest": [lambda store, stream: store.get_note("share-key"), lambda store, stream: lease(store, "scheduler")],
    "egress": [lambda store, stream: lease(store, "scheduler"), lambda store, stream: store.put_costs("gpu", {})],
    "gateway": [lambda store, stream: lease(store, "scheduler"), lambda store, stream: store.put_costs("gpu", {})],
    "scheduler": [lambda store, stream: store.get_note("share-key"), lambda store, stream: store.get_embedding("abc")],
}


@pytest.fixture
async def stream(servers: Operated) -> str:
    """A stream that is under way."""
    name = f"s{secrets.token_hex(4)}"
    scheduler = await connected(servers, "scheduler")
    await scheduler.create(name, StreamSpec(source=PatternSource(), prompt="ink"))
    await scheduler.close()
    return name


async def connected(servers: Operated, user: str) -> RedisStore:
    return await RedisStore.connect(servers.redis_url, credentials=servers.store(user))


@pytest.mark.parametrize("user", RIGHTS)
async def test_it_does_what_it_needs_and_nothing_of_others(servers: Operated, user: str, stream: str) -> None:
    store = await connected(servers, user)
    try:
        for method in NEEDS[user]:
            await method(store, stream)
        for method in FORBIDDEN[user]:
            with pytest.raises(StoreUnavailableError, match="permission"):
                await method(store, stream)
    finally:
        await store.close()


@pytest.mark.parametrize("user", RIGHTS)
async def test_nobody_may_empty_copy_or_reconfigure_it(servers: Operated, user: str) -> None:
    who = servers.store(user)
    client = Redis.from_url(servers.redis_url, username=who.user, password=who.password)
    for command in (
        ["FLUSHALL"],
        ["CONFIG", "SET", "dir", "/"],
        ["KEYS", "*"],
        ["SAVE"],
        ["ACL", "LIST"],
        ["DEBUG", "SLEEP", "0"],
    ):
        with pytest.raises(NoPermissionError):
            await client.execute_command(*command)
    await client.aclose()


async def test_who_gives_no_password_may_ask_whether_it_lives(servers: Operated) -> None:
    client = Redis.from_url(servers.redis_url)
    assert await client.ping()
    with pytest.raises(RedisError):
        await client.get("rheo:index")
    await client.aclose()
    wrong = servers.store("worker")
    with pytest.raises(StoreUnavailableError, match="RHEOCAST_REDIS_PASSWORD_FILE"):
        await RedisStore.connect(servers.redis_url, credentials=type(wrong)("worker", "wrong"))


async def test_sessions_outlive_a_restart_and_are_never_evicted(servers: Operated, stream: str) -> None:
    """The file's own settings, asked of the server by what it does: full means an error for who writes."""
    scheduler = await connected(servers, "scheduler")
    await asyncio.sleep(1.1)  # appendfsync everysec
    servers.stop("redis", kill=True)
    servers.start("redis")
    assert await scheduler.get(stream) is not None
    text = servers.redis_conf.read_text()
    assert "maxmemory-policy noeviction" in text
    assert "appendonly yes" in text
    await scheduler.close()
