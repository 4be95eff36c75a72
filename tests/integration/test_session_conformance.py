"""One suite that both session stores must pass: in memory, and over a real redis-server."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator

import pytest

from shared.clock import VirtualClock
from shared.contracts.events import LedgerTotals
from shared.embedded import free_port
from shared.session.memory import MemoryStore
from shared.session.port import (
    NoSuchStreamError,
    SessionStore,
    StoreUnavailableError,
    StreamExistsError,
    pack,
)
from shared.session.redis import RedisStore
from shared.session.state import FieldOwnerError, IllegalMoveError, Owner, StreamState
from tests.support.messages import spec

pytestmark = pytest.mark.integration


@pytest.fixture(params=["memory", "redis"])
async def store(request: pytest.FixtureRequest) -> AsyncIterator[SessionStore]:
    """A store with nothing in it."""
    made: SessionStore
    if request.param == "memory":
        made = MemoryStore()
    else:
        made = await RedisStore.connect(request.getfixturevalue("redis_url"), f"test-{uuid.uuid4().hex[:8]}:")
    yield made
    await made.close()


TTL_S = 0.3


@pytest.fixture(params=["memory", "redis"])
async def hasty(request: pytest.FixtureRequest) -> AsyncIterator[SessionStore]:
    """A store that forgets ended streams after TTL_S."""
    made: SessionStore
    if request.param == "memory":
        made = MemoryStore(ended_ttl_s=TTL_S)
    else:
        url, prefix = request.getfixturevalue("redis_url"), f"test-{uuid.uuid4().hex[:8]}:"
        made = await RedisStore.connect(url, prefix, TTL_S)
    yield made
    await made.close()


async def test_a_session_holds_what_its_owners_put(store: SessionStore) -> None:
    await store.create("s1", spec(steps=3))
    await store.put(
        "s1", Owner.SCHEDULER, {"assignment": {"noise": 0.8, "epoch": 2, "workers": ("a", "b")}, "epoch": 2}
    )
    await store.put("s1", Owner.MOTION, {"controller": {"previous": 0.71}})
    session = await store.get("s1")
    assert session == {
        "spec": spec(steps=3),
        "state": StreamState.STARTING,
        "assignment": {"noise": 0.8, "epoch": 2, "workers": ["a", "b"]},
        "epoch": 2,
        "controller": {"previous": 0.71},
    }
    assert await store.streams() == ["s1"]


async def test_a_field_is_written_by_its_owner_only(store: SessionStore) -> None:
    await store.create("s1", spec())
    with pytest.raises(FieldOwnerError, match="belongs to scheduler, not to motion"):
        await store.put("s1", Owner.MOTION, {"controller": 1, "epoch": 2})
    with pytest.raises(FieldOwnerError, match="has no owner"):
        await store.put("s1", Owner.MOTION, {"colour": 1})
    with pytest.raises(FieldOwnerError, match="create and move"):
        await store.put("s1", Owner.SCHEDULER, {"state": "live"})
    session = await store.get("s1")
    assert session is not None
    assert "controller" not in session


async def test_what_is_not_there(store: SessionStore) -> None:
    assert await store.get("s1") is None
    with pytest.raises(NoSuchStreamError):
        await store.put("s1", Owner.MOTION, {"controller": 1})
    with pytest.raises(NoSuchStreamError):
        await store.move("s1", StreamState.LIVE)
    assert await store.ledger("s1") == (LedgerTotals(), 0, 0)
    await store.delete("s1")


async def test_a_life_by_legal_moves(store: SessionStore) -> None:
    await store.create("s1", spec())
    way = [
        StreamState.LIVE,
        StreamState.DEGRADED,
        StreamState.RECOVERING,
        StreamState.LIVE,
        StreamState.STOPPING,
        StreamState.STOPPED,
    ]
    before = [await store.move("s1", to) for to in way]
    assert before == [StreamState.STARTING, *way[:-1]]


async def test_an_illegal_move_names_itself_and_changes_nothing(store: SessionStore) -> None:
    await store.create("s1", spec())
    with pytest.raises(IllegalMoveError, match="s1: illegal move starting → recovering"):
        await store.move("s1", StreamState.RECOVERING)
    await store.move("s1", StreamState.LIVE)
    with pytest.raises(IllegalMoveError, match="live → failed"):
        await store.move("s1", StreamState.FAILED)
    session = await store.get("s1")
    assert session is not None
    assert session["state"] is StreamState.LIVE


async def test_of_many_who_move_a_stream_at_once_one_succeeds(store: SessionStore) -> None:
    await store.create("s1", spec())
    results = await asyncio.gather(*(store.move("s1", StreamState.STOPPING) for _ in range(10)), return_exceptions=True)
    assert results.count(StreamState.STARTING) == 1
    assert sum(isinstance(result, IllegalMoveError) for result in results) == 9


async def test_a_stream_under_way_is_not_created_again_but_one_that_ended_is(store: SessionStore) -> None:
    await store.create("s1", spec())
    await store.close_chunk("s1", 0, {"on_time": 5})
    await store.put("s1", Owner.SCHEDULER, {"epoch": 3})
    with pytest.raises(StreamExistsError, match="under way"):
        await store.create("s1", spec())
    await store.move("s1", StreamState.FAILED)
    await store.create("s1", spec(prompt="another"))
    assert await store.get("s1") == {"spec": spec(prompt="another"), "state": StreamState.STARTING}
    assert await store.ledger("s1") == (LedgerTotals(), 0, 0)


async def test_deleting_forgets_everything(store: SessionStore) -> None:
    await store.create("s1", spec())
    await store.create("s2", spec())
    await store.close_chunk("s1", 0, {"on_time": 5})
    await store.delete("s1")
    assert await store.get("s1") is None
    assert await store.streams() == ["s2"]
    assert await store.ledger("s1") == (LedgerTotals(), 0, 0)


@pytest.mark.parametrize("way", [(StreamState.FAILED,), (StreamState.STOPPING, StreamState.STOPPED)])
async def test_an_ended_stream_can_be_read_for_a_while_and_is_then_forgotten(
    hasty: SessionStore, way: tuple[StreamState, ...]
) -> None:
    await hasty.create("over", spec())
    await hasty.create("under-way", spec())
    for stream in ("over", "under-way"):
        await hasty.close_chunk(stream, 0, {"on_time": 5})
        await hasty.close_chunk(stream, 2, {"on_time": 5})
    for to in way:
        await hasty.move("over", to)
    assert await hasty.streams() == ["over", "under-way"]
    session = await hasty.get("over")
    assert session is not None
    assert session["state"] is way[-1]
    assert (await hasty.ledger("over"))[0].on_time == 10

    await asyncio.sleep(TTL_S + 0.1)
    assert await hasty.streams() == ["under-way"]
    assert await hasty.get("over") is None
    assert await hasty.ledger("over") == (LedgerTotals(), 0, 0)
    assert (await hasty.ledger("under-way"))[0].on_time == 10
    with pytest.raises(NoSuchStreamError):
        await hasty.put("over", Owner.EGRESS, {"stats": 1})


async def test_what_comes_after_the_end_does_not_prolong_it(hasty: SessionStore) -> None:
    await hasty.create("s1", spec())
    await hasty.move("s1", StreamState.FAILED)
    await asyncio.sleep(TTL_S / 2)
    await hasty.put("s1", Owner.EGRESS, {"stats": 1})
    await hasty.close_chunk("s1", 1, {"egress:lost": 5})
    await hasty.put_ledger_frames_in("s1", 5)
    assert (await hasty.ledger("s1"))[0].frames_in == 5
    await asyncio.sleep(TTL_S / 2 + 0.1)
    assert await hasty.get("s1") is None
    assert await hasty.ledger("s1") == (LedgerTotals(), 0, 0)


async def test_a_ledger_without_a_session_does_not_stay(hasty: SessionStore) -> None:
    await hasty.close_chunk("nobody", 1, {"on_time": 5})
    await hasty.put_ledger_frames_in("nobody-either", 5)
    assert (await hasty.ledger("nobody"))[1] == 1
    await asyncio.sleep(TTL_S + 0.1)
    assert await hasty.ledger("nobody") == (LedgerTotals(), 0, 0)
    assert await hasty.ledger("nobody-either") == (LedgerTotals(), 0, 0)
    assert await hasty.streams() == []


async def test_an_id_that_is_used_again_lives_on_when_its_former_life_would_be_forgotten(hasty: SessionStore) -> None:
    await hasty.create("s1", spec())
    await hasty.move("s1", StreamState.FAILED)
    await hasty.create("s1", spec())
    await hasty.close_chunk("s1", 0, {"on_time": 5})
    await asyncio.sleep(TTL_S + 0.1)
    assert await hasty.streams() == ["s1"]
    assert await hasty.get("s1") is not None
    assert (await hasty.ledger("s1"))[0].on_time == 5


async def test_embeddings_by_digest(store: SessionStore) -> None:
    data = bytes(range(256)) * 64
    assert await store.get_embedding("d1") is None
    await store.put_embedding("d1", "float32", (16, 256), data)
    assert await store.get_embedding("d1") == ("float32", (16, 256), data)


async def taken(store: SessionStore) -> int:
    """Bytes that the embedding d1 takes."""
    if isinstance(store, RedisStore):
        return await store._redis.memory_usage(store._key("embedding", "d1"))  # type: ignore[misc]
    assert isinstance(store, MemoryStore)
    return len(store._embeddings["d1"][-1])


@pytest.mark.parametrize("words", [b"", b"\1\0\0\x80", b"\0" * 7 + b"\x80" + b"\0\1" * 40])
async def test_an_embeddings_padding_takes_no_room(store: SessionStore, words: bytes) -> None:
    data = words.ljust(8 << 20, b"\0")
    await store.put_embedding("d1", "float32", (512, 4096), data)
    assert await store.get_embedding("d1") == ("float32", (512, 4096), data)
    assert await taken(store) < 1000


async def test_an_embedding_is_forgotten_ten_minutes_after_it_was_last_read() -> None:
    clock = VirtualClock()
    store = MemoryStore(clock)
    await store.put_embedding("d1", "float32", (2,), b"12345678")
    for _ in range(3):
        clock.jump(599.0)
        assert await store.get_embedding("d1") is not None
    clock.jump(601.0)
    assert await store.get_embedding("d1") is None


async def test_redis_forgets_an_embedding_ten_minutes_after_it_was_last_read(redis_store: RedisStore) -> None:
    key = redis_store._key("embedding", "d1")
    await redis_store.put_embedding("d1", "float32", (2,), b"12345678")
    assert 590 < await redis_store._redis.ttl(key) <= 600
    await redis_store._redis.expire(key, 5)
    assert await redis_store.get_embedding("d1") is not None
    assert 590 < await redis_store._redis.ttl(key) <= 600


async def test_an_embedding_that_was_kept_with_its_padding_is_read(redis_store: RedisStore) -> None:
    kept = {"dtype": "float32", "shape": pack([2, 1]), "data": b"1234" + bytes(4)}
    await redis_store._redis.hset(redis_store._key("embedding", "d1"), mapping=kept)  # type: ignore[misc]
    assert await redis_store.get_embedding("d1") == ("float32", (2, 1), b"1234" + bytes(4))


async def test_costs_by_place(store: SessionStore) -> None:
    costs = {"stage.0": {"cells": [[1, 240, 12.5]], "speed": 1.25}, "decode": {"cells": []}}
    assert await store.get_costs("cpu/float32:rheo-tiny:320x192") is None
    await store.put_costs("cpu/float32:rheo-tiny:320x192", costs)
    assert await store.get_costs("cpu/float32:rheo-tiny:320x192") == costs
    await store.put_costs("cpu/float32:rheo-tiny:320x192", {})
    assert await store.get_costs("cpu/float32:rheo-tiny:320x192") == {}


async def test_a_lease_has_one_holder_and_ever_larger_terms(store: SessionStore) -> None:
    first = await store.acquire("lead", "a", 5.0)
    assert first is not None
    assert await store.acquire("lead", "b", 5.0) is None
    assert await store.renew("lead", "a", first, 5.0)
    assert not await store.renew("lead", "b", first, 5.0)
    again = await store.acquire("lead", "a", 5.0)
    assert again is not None
    assert again > first
    assert not await store.renew("lead", "a", first, 5.0), "an older term of the same holder is over"
    await store.release("lead", "a", first)
    assert await store.acquire("lead", "b", 5.0) is None, "only the newest term can give it back"
    await store.release("lead", "a", again)
    third = await store.acquire("lead", "b", 5.0)
    assert third is not None
    assert third > again


async def test_a_lease_that_is_not_renewed_ends_in_time(store: SessionStore) -> None:
    term = await store.acquire("lead", "a", 0.1)
    assert term is not None
    await asyncio.sleep(0.2)
    assert not await store.renew("lead", "a", term, 5.0)
    assert await store.acquire("lead", "b", 5.0) == term + 1


async def test_one_of_many_gets_the_lease(store: SessionStore) -> None:
    terms = await asyncio.gather(*(store.acquire("lead", f"h{i}", 5.0) for i in range(10)))
    assert sum(term is not None for term in terms) == 1


async def test_the_first_verdict_wins(store: SessionStore) -> None:
    await store.create("s1", spec())
    assert await store.close_chunk("s1", 0, {"on_time": 3, "late": 2})
    assert not await store.close_chunk("s1", 0, {"egress:lost": 5})
    totals, closed, through = await store.ledger("s1")
    assert totals == LedgerTotals(on_time=3, late=2)
    assert (closed, through) == (1, 1)


async def test_the_watermark_moves_over_closed_chunks_only(store: SessionStore) -> None:
    for chunk in (0, 2, 3):
        await store.close_chunk("s1", chunk, {"on_time": 4})
    assert (await store.ledger("s1"))[1:] == (3, 1)
    await store.close_chunk("s1", 1, {"scheduler:stale": 4})
    totals, closed, through = await store.ledger("s1")
    assert (closed, through) == (4, 4)
    assert totals == LedgerTotals(on_time=12, dropped={"scheduler:stale": 4})
    assert not await store.close_chunk("s1", 2, {"late": 4}), "below the watermark it is still known to be closed"


async def test_of_many_verdicts_at_once_one_counts(store: SessionStore) -> None:
    won = await asyncio.gather(*(store.close_chunk("s1", 0, {"on_time": 4}) for _ in range(20)))
    assert won.count(True) == 1
    assert (await store.ledger("s1"))[0].on_time == 4


async def test_ingests_totals_only_grow(store: SessionStore) -> None:
    await store.put_ledger_frames_in("s1", 40, {"ingest:overwritten": 3})
    await store.put_ledger_frames_in("s1", 36, {"ingest:overwritten": 2})
    await store.close_chunk("s1", 0, {"on_time": 5, "ingest:late": 1})
    totals, _, _ = await store.ledger("s1")
    assert totals == LedgerTotals(frames_in=40, on_time=5, dropped={"ingest:overwritten": 3, "ingest:late": 1})


async def test_a_verdict_of_another_name_is_refused(store: SessionStore) -> None:
    with pytest.raises(ValueError, match="is no verdict"):
        await store.close_chunk("s1", 0, {"on-time": 4})
    with pytest.raises(ValueError, match="cannot be"):
        await store.close_chunk("s1", 0, {"on_time": -4})
    assert (await store.ledger("s1"))[1] == 0


async def test_the_ledgers_memory_stays_flat(redis_store: RedisStore) -> None:
    for chunk in range(500):
        await redis_store.close_chunk("s1", chunk ^ 1, {"on_time": 4})
    client = redis_store._redis
    assert await client.scard(redis_store._key("ledger", "s1", "above")) == 0
    assert await client.hlen(redis_store._key("ledger", "s1")) == 3


async def test_forgotten_streams_leave_no_key_behind(redis_url: str) -> None:
    prefix = f"test-{uuid.uuid4().hex[:8]}:"
    store = await RedisStore.connect(redis_url, prefix, TTL_S)
    for number in range(20):
        await store.create(f"s{number}", spec())
        await store.close_chunk(f"s{number}", 1, {"on_time": 5})
        await store.move(f"s{number}", StreamState.FAILED)
        await store.close_chunk(f"s{number}", 3, {"on_time": 5})
    await asyncio.sleep(TTL_S + 0.1)
    assert await store.streams() == []
    assert [key async for key in store._redis.scan_iter(f"{prefix}*") if await store._redis.exists(key)] == []
    await store.close()


async def test_no_server_is_one_line_with_the_url_and_the_fix_within_three_seconds() -> None:
    url = f"redis://127.0.0.1:{free_port()}/0"
    began = time.monotonic()
    with pytest.raises(StoreUnavailableError) as raised:
        await RedisStore.connect(url)
    assert time.monotonic() - began < 3.5
    text = str(raised.value)
    assert url in text
    assert "RHEOCAST_REDIS_URL" in text
    assert "\n" not in text


async def test_notes_are_kept_for_their_time_and_claimed_once(store: SessionStore) -> None:
    assert await store.put_note("share:a:1", {"until": 5, "tags": ["x"]}, 60.0)
    assert await store.get_note("share:a:1") == {"until": 5, "tags": ["x"]}
    assert not await store.put_note("share:a:1", 2, 60.0, if_absent=True)
    assert await store.get_note("share:a:1") != 2
    assert await store.put_note("share:a:2", 2, 60.0, if_absent=True)
    assert await store.put_note("share:b*:1", 3, 60.0)
    assert await store.notes("share:a:") == ["share:a:1", "share:a:2"]
    assert await store.notes("share:b*") == ["share:b*:1"]
    assert await store.notes("share:*") == []
    assert await store.drop_note("share:a:1")
    assert not await store.drop_note("share:a:1")
    assert await store.get_note("share:a:1") is None
    assert await store.put_note("brief", 1, 0.05)
    await asyncio.sleep(0.1)
    assert await store.get_note("brief") is None
    assert await store.put_note("brief", 2, 60.0, if_absent=True)
