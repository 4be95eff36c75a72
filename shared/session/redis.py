"""The session store in Redis. What must not be torn apart is one Lua script, which Redis runs as one transaction.

Keys, all under ``prefix``: ``index`` (ids by the time they are forgotten, UNIX ms, +inf while under way), ``stream:<id>``
(hash), ``ledger:<id>`` (hash: closed, through, frames_in, ``n:<verdict>``, ``s:<ingest's drops>``), ``ledger:<id>:above``
(set of closed chunks over the watermark), ``embedding:<digest>`` (hash; data without the zeros at its end, and its whole size),
``costs:<place>``, ``note:<place>`` (packed), ``lease:<name>`` (hash), ``term:<name>`` (counter).
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Mapping, Sequence
from types import CoroutineType
from typing import Any, ParamSpec, Self, TypeVar

from redis import exceptions as redis_errors
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import ConstantBackoff

from shared.contracts.commands import StreamSpec
from shared.contracts.events import LedgerTotals
from shared.credentials import NOBODY, Credentials, without_password
from shared.session.port import (
    COSTS_TTL_S,
    EMBEDDING_TTL_S,
    ENDED_TTL_S,
    NoSuchStreamError,
    StoreUnavailableError,
    StreamExistsError,
    decode_session,
    pack,
    totals_of,
    unpack,
    verdict_counts,
    with_zeros,
    without_zeros,
)
from shared.session.state import (
    TERMINAL_STATES,
    IllegalMoveError,
    Owner,
    StreamState,
    check_owner,
    states_before,
)

CONNECT_S = 3.0
ANSWER_S = 3.0
MAX_CONNECTIONS = 16

P = ParamSpec("P")
R = TypeVar("R")

# KEYS: stream, index, ledger, above. ARGV: id, spec, starting, then the states that may be replaced.
_CREATE = """
local state = redis.call('HGET', KEYS[1], 'state')
if state then
  local over = false
  for i = 4, #ARGV do if ARGV[i] == state then over = true end end
  if not over then return 0 end
end
redis.call('DEL', KEYS[1], KEYS[3], KEYS[4])
redis.call('HSET', KEYS[1], 'spec', ARGV[2], 'state', ARGV[3])
redis.call('ZADD', KEYS[2], '+inf', ARGV[1])
return 1
"""

# KEYS: stream. ARGV: field, value, …
_PUT = """
if redis.call('EXISTS', KEYS[1]) == 0 then return 0 end
redis.call('HSET', KEYS[1], unpack(ARGV))
return 1
"""

# The server's time in ms: the index and the keys must agree on it.
_NOW = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
"""

# KEYS: stream, index, ledger, above. ARGV: id, to, ms to keep it (0: for good), then the states it may follow.
# Returns {moved, state before}.
_MOVE = (
    _NOW
    + """
local state = redis.call('HGET', KEYS[1], 'state')
if not state then return {0, ''} end
for i = 4, #ARGV do
  if ARGV[i] == state then
    redis.call('HSET', KEYS[1], 'state', ARGV[2])
    if ARGV[3] ~= '0' then
      local over = string.format('%d', now + ARGV[3])
      for _, key in ipairs({KEYS[1], KEYS[3], KEYS[4]}) do redis.call('PEXPIREAT', key, over) end
      redis.call('ZADD', KEYS[2], over, ARGV[1])
    end
    return {1, state}
  end
end
return {0, state}
"""
)

# KEYS: index.
_STREAMS = (
    _NOW
    + """
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', '(' .. string.format('%d', now))
return redis.call('ZRANGE', KEYS[1], 0, -1)
"""
)

# KEYS: lease, term. ARGV: holder, ttl in ms.
_ACQUIRE = """
local holder = redis.call('HGET', KEYS[1], 'holder')
if holder and holder ~= ARGV[1] then return 0 end
local term = redis.call('INCR', KEYS[2])
redis.call('HSET', KEYS[1], 'holder', ARGV[1], 'term', term)
redis.call('PEXPIRE', KEYS[1], ARGV[2])
return term
"""

# KEYS: lease. ARGV: holder, term, ttl in ms (0: release).
_RENEW = """
local lease = redis.call('HMGET', KEYS[1], 'holder', 'term')
if lease[1] ~= ARGV[1] or lease[2] ~= ARGV[2] then return 0 end
if ARGV[3] == '0' then redis.call('DEL', KEYS[1]) else redis.call('PEXPIRE', KEYS[1], ARGV[3]) end
return 1
"""

# KEYS: stream, ledger, above. ARGV: ms to keep a ledger that has no session. One that has goes when the session goes.
_KEEP_LEDGER = """
local left = redis.call('PTTL', KEYS[1])
if left ~= -1 then
  if left == -2 then left = tonumber(ARGV[1]) end
  for i = 2, 3 do redis.call('PEXPIRE', KEYS[i], math.max(left, 1)) end
end
return 1
"""

# KEYS: stream, ledger, above. ARGV: ms, chunk, then verdict, frames, …
_CLOSE_CHUNK = (
    """
local chunk = tonumber(ARGV[2])
local through = tonumber(redis.call('HGET', KEYS[2], 'through') or '0')
if chunk < through or redis.call('SISMEMBER', KEYS[3], ARGV[2]) == 1 then return 0 end
redis.call('SADD', KEYS[3], ARGV[2])
redis.call('HINCRBY', KEYS[2], 'closed', 1)
for i = 3, #ARGV, 2 do redis.call('HINCRBY', KEYS[2], 'n:' .. ARGV[i], ARGV[i + 1]) end
while redis.call('SREM', KEYS[3], string.format('%d', through)) == 1 do through = through + 1 end
redis.call('HSET', KEYS[2], 'through', string.format('%d', through))
"""
    + _KEEP_LEDGER
)

# KEYS: stream, ledger, above. ARGV: ms, field, number, …: each is raised to the number, never lowered.
_RAISE = (
    """
for i = 2, #ARGV, 2 do
  local old = tonumber(redis.call('HGET', KEYS[2], ARGV[i]) or '-1')
  if tonumber(ARGV[i + 1]) > old then redis.call('HSET', KEYS[2], ARGV[i], ARGV[i + 1]) end
end
"""
    + _KEEP_LEDGER
)


def _reached(method: Callable[P, CoroutineType[Any, Any, R]]) -> Callable[P, CoroutineType[Any, Any, R]]:
    """Turn the client's errors into StoreUnavailableError, and let no cancellation be lost.

    The client waits by ``asyncio.wait_for``, which on Python 3.11 swallows a cancellation that comes together with the
    answer: a task cancelled during a call would go on for ever, and whoever awaits its end with it.
    """

    @functools.wraps(method)
    async def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
        task = asyncio.current_task()
        before = task.cancelling() if task is not None else 0
        try:
            result = await method(*args, **kwargs)
            if task is not None and task.cancelling() > before:
                raise asyncio.CancelledError
            return result
        except (redis_errors.RedisError, OSError, TimeoutError) as error:
            text = (str(error).splitlines() or [""])[0]
            raise StoreUnavailableError(f"Redis failed in {method.__name__}: {text or type(error).__name__}") from error

    return guarded


class RedisStore:
    """See ``SessionStore``. Connect with ``await RedisStore.connect(url)``; ended streams are kept ``ended_ttl_s``."""

    def __init__(self, client: Redis, prefix: str = "rheo:", ended_ttl_s: float = ENDED_TTL_S) -> None:
        self._redis = client
        self._prefix = prefix
        self._ended_ms = _ms(ended_ttl_s)
        self._create = client.register_script(_CREATE)
        self._put = client.register_script(_PUT)
        self._move = client.register_script(_MOVE)
        self._streams = client.register_script(_STREAMS)
        self._acquire = client.register_script(_ACQUIRE)
        self._renew = client.register_script(_RENEW)
        self._close_chunk = client.register_script(_CLOSE_CHUNK)
        self._raise = client.register_script(_RAISE)

    @classmethod
    async def connect(
        cls, url: str, prefix: str = "rheo:", ended_ttl_s: float = ENDED_TTL_S, credentials: Credentials = NOBODY
    ) -> Self:
        """A store whose server answered. Raises StoreUnavailableError within 3 s. ``rediss://``: it must prove who it is."""
        shown = without_password(url)
        options: dict[str, Any] = {}
        if credentials.user:
            options |= {"username": credentials.user, "password": credentials.password}
        if url.startswith("rediss://") and credentials.ca is not None:
            options["ssl_ca_certs"] = str(credentials.ca)
        try:
            # Blocking: with all connections in use a command waits for one instead of failing.
            pool = BlockingConnectionPool.from_url(
                url,
                max_connections=MAX_CONNECTIONS,
                timeout=ANSWER_S,
                socket_connect_timeout=CONNECT_S,
                socket_timeout=ANSWER_S,
                health_check_interval=30,
                retry=Retry(ConstantBackoff(0.1), 1),
                **options,
            )
        except ValueError as error:
            # What the library says of it may be a piece of the password.
            reason = "write what is special in its password as %XX" if shown != url else str(error)
            raise StoreUnavailableError(f"{shown!r} is no Redis URL ({reason}): set RHEOCAST_REDIS_URL") from None
        client = Redis.from_pool(pool)
        try:
            async with asyncio.timeout(CONNECT_S):
                await client.ping()  # type: ignore[misc]
        except (redis_errors.RedisError, OSError, TimeoutError) as error:
            await client.aclose()
            reason = (str(error).splitlines() or [""])[0] or "no answer"
            if isinstance(error, redis_errors.AuthenticationError | redis_errors.NoPermissionError):
                raise StoreUnavailableError(
                    f"Redis at {shown} does not let {credentials.user or 'a nobody'} in ({reason}): "
                    "set RHEOCAST_REDIS_USER and RHEOCAST_REDIS_PASSWORD_FILE"
                ) from error
            raise StoreUnavailableError(
                f"no Redis server at {shown} ({reason}): start redis-server there, or set RHEOCAST_REDIS_URL"
            ) from error
        return cls(client, prefix, ended_ttl_s)

    def _key(self, *parts: str) -> str:
        return self._prefix + ":".join(parts)

    def _ledger_keys(self, stream: str) -> list[str]:
        return [self._key("ledger", stream), self._key("ledger", stream, "above")]

    def _stream_keys(self, stream: str) -> list[str]:
        return [self._key("stream", stream), self._key("index"), *self._ledger_keys(stream)]

    @_reached
    async def create(self, stream: str, spec: StreamSpec) -> None:
        over = [pack(state.value) for state in TERMINAL_STATES]
        args = [stream, pack(spec.model_dump()), pack(StreamState.STARTING.value), *over]
        if not await self._create(keys=self._stream_keys(stream), args=args):
            raise StreamExistsError(f"stream {stream} is under way")

    @_reached
    async def put(self, stream: str, owner: Owner, fields: Mapping[str, Any]) -> None:
        check_owner(owner, fields)
        args = [part for name, value in fields.items() for part in (name, pack(value))]
        if args and not await self._put(keys=[self._key("stream", stream)], args=args):
            raise NoSuchStreamError(f"stream {stream} is not known")

    @_reached
    async def get(self, stream: str) -> dict[str, Any] | None:
        fields: dict[bytes, bytes] = await self._redis.hgetall(self._key("stream", stream))  # type: ignore[misc]
        return decode_session({name.decode(): data for name, data in fields.items()}) if fields else None

    @_reached
    async def streams(self) -> list[str]:
        members: list[bytes] = await self._streams(keys=[self._key("index")])
        return sorted(member.decode() for member in members)

    @_reached
    async def move(self, stream: str, to: StreamState) -> StreamState:
        keep_ms = self._ended_ms if to in TERMINAL_STATES else 0
        args = [stream, pack(to.value), keep_ms, *(pack(state.value) for state in states_before(to))]
        moved, before = await self._move(keys=self._stream_keys(stream), args=args)
        if not before:
            raise NoSuchStreamError(f"stream {stream} is not known")
        current = StreamState(unpack(before))
        if not moved:
            raise IllegalMoveError(stream, current, to)
        return current

    @_reached
    async def delete(self, stream: str) -> None:
        async with self._redis.pipeline(transaction=True) as pipe:
            pipe.delete(self._key("stream", stream), *self._ledger_keys(stream))
            pipe.zrem(self._key("index"), stream)
            await pipe.execute()

    @_reached
    async def put_embedding(self, digest: str, dtype: str, shape: Sequence[int], data: bytes) -> None:
        key = self._key("embedding", digest)
        size, kept = without_zeros(bytes(data))
        async with self._redis.pipeline(transaction=True) as pipe:
            pipe.hset(key, mapping={"dtype": dtype, "shape": pack(list(shape)), "size": size, "data": kept})
            pipe.expire(key, round(EMBEDDING_TTL_S))
            await pipe.execute()

    @_reached
    async def get_embedding(self, digest: str) -> tuple[str, tuple[int, ...], bytes] | None:
        key = self._key("embedding", digest)
        found: list[Any] = await self._redis.hmget(key, ["dtype", "shape", "size", "data"])  # type: ignore[misc]
        dtype, shape, size, data = found
        if dtype is None or shape is None or data is None:
            return None
        await self._redis.expire(key, round(EMBEDDING_TTL_S))
        return dtype.decode(), tuple(unpack(shape)), with_zeros(int(size or 0), data)

    @_reached
    async def put_costs(self, place: str, costs: Mapping[str, Any]) -> None:
        await self._redis.set(self._key("costs", place), pack(dict(costs)), px=_ms(COSTS_TTL_S))

    @_reached
    async def get_costs(self, place: str) -> dict[str, Any] | None:
        data: Any = await self._redis.get(self._key("costs", place))
        return None if data is None else unpack(data)

    @_reached
    async def put_note(self, place: str, value: Any, ttl_s: float, *, if_absent: bool = False) -> bool:
        return bool(await self._redis.set(self._key("note", place), pack(value), px=_ms(ttl_s), nx=if_absent))

    @_reached
    async def get_note(self, place: str) -> Any:
        data: Any = await self._redis.get(self._key("note", place))
        return None if data is None else unpack(data)

    @_reached
    async def drop_note(self, place: str) -> bool:
        return bool(await self._redis.delete(self._key("note", place)))

    @_reached
    async def notes(self, prefix: str) -> list[str]:
        begin = self._key("note", "")
        plain = "".join(f"[{char}]" if char in "*?[" else char for char in begin + prefix)
        return sorted([key.decode().removeprefix(begin) async for key in self._redis.scan_iter(f"{plain}*", count=500)])

    @_reached
    async def acquire(self, name: str, holder: str, ttl_s: float) -> int | None:
        keys = [self._key("lease", name), self._key("term", name)]
        term = await self._acquire(keys=keys, args=[holder, _ms(ttl_s)])
        return int(term) or None

    @_reached
    async def renew(self, name: str, holder: str, term: int, ttl_s: float) -> bool:
        return bool(await self._renew(keys=[self._key("lease", name)], args=[holder, term, _ms(ttl_s)]))

    @_reached
    async def release(self, name: str, holder: str, term: int) -> None:
        await self._renew(keys=[self._key("lease", name)], args=[holder, term, 0])

    @_reached
    async def close_chunk(self, stream: str, chunk: int, verdict: dict[str, int]) -> bool:
        args: list[str | int] = [self._ended_ms, chunk]
        for name, frames in verdict_counts(verdict).items():
            args += [name, frames]
        keys = [self._key("stream", stream), *self._ledger_keys(stream)]
        return bool(await self._close_chunk(keys=keys, args=args))

    @_reached
    async def ledger(self, stream: str) -> tuple[LedgerTotals, int, int]:
        stored: dict[bytes, bytes] = await self._redis.hgetall(self._key("ledger", stream))  # type: ignore[misc]
        counts: dict[str, int] = {}
        plain = {"closed": 0, "through": 0, "frames_in": 0}
        for key, value in stored.items():
            name = key.decode()
            if name[:2] in ("n:", "s:"):
                counts[name[2:]] = counts.get(name[2:], 0) + int(value)
            else:
                plain[name] = int(value)
        return totals_of(counts, plain["frames_in"]), plain["closed"], plain["through"]

    @_reached
    async def put_ledger_frames_in(self, stream: str, frames_in: int, dropped: Mapping[str, int] | None = None) -> None:
        args: list[str | int] = [self._ended_ms, "frames_in", frames_in]
        for name, frames in verdict_counts(dropped or {}).items():
            args += [f"s:{name}", frames]
        await self._raise(keys=[self._key("stream", stream), *self._ledger_keys(stream)], args=args)

    async def close(self) -> None:
        """Close the connections. Idempotent."""
        await self._redis.aclose()


def _ms(seconds: float) -> int:
    return max(1, round(seconds * 1000))
