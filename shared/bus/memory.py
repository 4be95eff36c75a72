"""The bus in one process: for tests, simulations and a single-process run. Messages pass through their bytes.

``MemoryBroker`` plays the server, one ``MemoryBus`` is one client of it. It keeps what NATS promises: groups share,
durable positions outlive a client, an unacknowledged message comes again.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from shared.bus.delivery import (
    ERROR_HEADER,
    MAX_DELIVERIES,
    NO_HEADERS,
    REDELIVER_S,
    Decoder,
    Pump,
    Raw,
    cancel,
    channel_of_subject,
    checked,
    encode_for,
    run_handler,
)
from shared.bus.mailbox import Mailbox
from shared.bus.port import (
    BusStats,
    BusUnavailableError,
    Handler,
    NoResponderError,
    Overflow,
    RequestFailedError,
    RequestTimeoutError,
    Server,
    Subscription,
)
from shared.contracts.catalog import Delivery, channel_of, matches
from shared.contracts.codec import decode, encode
from shared.contracts.refs import Wire
from shared.telemetry.propagation import attach, detach, inject

log = logging.getLogger(__name__)

KEPT_MESSAGES = 10_000
MAX_PAYLOAD = 8 * 1024 * 1024


@dataclass(slots=True, eq=False)
class _Reader:
    """A core subscription, or a server of requests."""

    pattern: str
    group: str
    put: Callable[[Raw], None]


@dataclass(slots=True, eq=False)
class _Kept:
    """A JetStream message with how often each consumer has had it."""

    seq: int
    raw: Raw


@dataclass(slots=True, eq=False)
class _Consumer:
    """A position in the kept messages: what waits, what is being handled."""

    pattern: str
    waiting: deque[_Kept] = field(default_factory=deque)
    deliveries: dict[int, int] = field(default_factory=dict)
    arrived: asyncio.Event = field(default_factory=asyncio.Event)

    def add(self, kept: _Kept, *, first: bool = False) -> None:
        if first:
            self.waiting.appendleft(kept)
        else:
            self.waiting.append(kept)
        self.arrived.set()


class MemoryBroker:
    """The server's part."""

    def __init__(self, max_payload: int = MAX_PAYLOAD) -> None:
        self.max_payload = max_payload
        self._readers: list[_Reader] = []
        self._turn: dict[tuple[str, str], int] = {}
        self._log: deque[_Kept] = deque(maxlen=KEPT_MESSAGES)
        self._consumers: list[_Consumer] = []
        self._durables: dict[str, _Consumer] = {}
        self._seq = itertools.count(1)
        self._inboxes: dict[str, asyncio.Future[Raw]] = {}
        self._inbox = itertools.count(1)

    # --- core --------------------------------------------------------------------------------------------------------

    def add(self, reader: _Reader) -> None:
        self._readers.append(reader)

    def remove(self, reader: _Reader) -> None:
        if reader in self._readers:
            self._readers.remove(reader)

    def deliver(self, raw: Raw) -> int:
        """To every reader, and to one member of each group; how many got it."""
        groups: dict[tuple[str, str], list[_Reader]] = {}
        count = 0
        for reader in self._readers:
            if not matches(reader.pattern, raw.subject):
                continue
            if reader.group:
                groups.setdefault((reader.pattern, reader.group), []).append(reader)
            else:
                reader.put(raw)
                count += 1
        for key, members in groups.items():
            turn = self._turn[key] = self._turn.get(key, -1) + 1
            members[turn % len(members)].put(raw)
            count += 1
        return count

    # --- kept messages -----------------------------------------------------------------------------------------------

    def keep(self, raw: Raw) -> None:
        kept = _Kept(next(self._seq), raw)
        self._log.append(kept)
        for consumer in self._consumers:
            if matches(consumer.pattern, raw.subject):
                consumer.add(kept)

    def consumer(self, pattern: str, durable: str, replay: bool) -> _Consumer:
        known = self._durables.get(durable) if durable else None
        if known is not None:
            return known
        consumer = _Consumer(pattern)
        if replay:
            for kept in self._log:
                if matches(pattern, kept.raw.subject):
                    consumer.add(kept)
        self._consumers.append(consumer)
        if durable:
            self._durables[durable] = consumer
        return consumer

    def forget(self, consumer: _Consumer) -> None:
        """An ephemeral consumer ends with its subscription; a durable one waits for the next."""
        if consumer in self._consumers and consumer not in self._durables.values():
            self._consumers.remove(consumer)

    # --- requests ----------------------------------------------------------------------------------------------------

    def open_inbox(self) -> tuple[str, asyncio.Future[Raw]]:
        name = f"_inbox.{next(self._inbox)}"
        future = self._inboxes[name] = asyncio.get_running_loop().create_future()
        return name, future

    def close_inbox(self, name: str) -> None:
        self._inboxes.pop(name, None)

    def reply(self, name: str, raw: Raw) -> None:
        future = self._inboxes.get(name)
        if future is not None and not future.done():
            future.set_result(raw)


class MemoryBus:
    """See ``Bus``. Buses on one broker hear each other."""

    def __init__(self, broker: MemoryBroker | None = None) -> None:
        self.stats = BusStats()
        self._broker = broker or MemoryBroker()
        self._subscriptions: set[_CoreSubscription | _KeptSubscription] = set()
        self._closed = False

    @property
    def max_payload(self) -> int:
        return self._broker.max_payload

    @property
    def connected(self) -> bool:
        return not self._closed

    def _check_open(self) -> None:
        if self._closed:
            raise BusUnavailableError("the bus is closed")

    async def publish(self, subject: str, message: Wire, headers: Mapping[str, str] | None = None) -> None:
        self._check_open()
        channel = channel_of_subject(subject)
        raw = Raw(subject, encode_for(channel, subject, message, self.max_payload), inject(headers) or NO_HEADERS)
        raw.received_ns = time.time_ns()
        self.stats.of(channel.subject).published += 1
        if channel.delivery is Delivery.JETSTREAM:
            self._broker.keep(raw)
            await asyncio.sleep(0)
        else:
            self._broker.deliver(raw)

    async def subscribe(
        self,
        pattern: str,
        handler: Handler,
        *,
        size: int = 256,
        overflow: Overflow = Overflow.DROP_NEWEST,
        group: str = "",
        durable: str = "",
        replay: bool = False,
    ) -> Subscription:
        self._check_open()
        channel = channel_of(pattern)
        counters = self.stats.of(pattern)
        decoder = Decoder(pattern, channel.messages, counters)

        async def handle(raw: Raw) -> bool:
            counters.received += 1
            received = decoder.decode(raw)
            return True if received is None else await run_handler(handler, received, counters)

        subscription: _CoreSubscription | _KeptSubscription
        if channel.delivery is Delivery.JETSTREAM:
            consumer = self._broker.consumer(pattern, durable or group, replay)
            subscription = _KeptSubscription(self._broker, consumer, handle, self._subscriptions)
        else:
            pump = Pump(pattern, Mailbox(size, overflow), handle, counters)
            subscription = _CoreSubscription(self._broker, _Reader(pattern, group, pump.put), pump, self._subscriptions)
        self._subscriptions.add(subscription)
        return subscription

    async def request(self, subject: str, message: Wire, timeout_s: float) -> Any:
        self._check_open()
        channel = channel_of_subject(subject)
        data = encode_for(channel, subject, message, self.max_payload)
        self.stats.of(channel.subject).published += 1
        inbox, answer = self._broker.open_inbox()
        try:
            raw = Raw(subject, data, inject() or NO_HEADERS, inbox, False, time.time_ns())
            if not self._broker.deliver(raw):
                raise NoResponderError(f"nobody serves {subject}")
            reply = await asyncio.wait_for(answer, timeout_s)
        except TimeoutError as error:
            raise RequestTimeoutError(f"no reply on {subject} within {timeout_s:g} s") from error
        finally:
            self._broker.close_inbox(inbox)
        if ERROR_HEADER in reply.headers:
            raise RequestFailedError(reply.headers[ERROR_HEADER])
        return decode(channel.replies, reply.data)

    async def serve(self, pattern: str, handler: Server, group: str = "") -> Subscription:
        self._check_open()
        channel = channel_of(pattern)
        counters = self.stats.of(pattern)
        decoder = Decoder(pattern, channel.messages, counters)

        async def answer(raw: Raw) -> None:
            counters.received += 1
            received = decoder.decode(raw)
            if received is None:
                error = "the request's bytes are no message of this subject"
                self._broker.reply(raw.reply, Raw("", b"", {ERROR_HEADER: error}))
                return
            token = attach(received.headers) if received.headers else None
            try:
                reply = checked(raw.subject, encode(await handler(received)), self.max_payload)
                self._broker.reply(raw.reply, Raw("", reply))
            except Exception as error:
                counters.handler_errors += 1
                log.exception("serving %s raised", raw.subject)
                text = (str(error).splitlines() or [""])[0][:200]
                self._broker.reply(raw.reply, Raw("", b"", {ERROR_HEADER: f"{type(error).__name__}: {text}"}))
            finally:
                detach(token)

        pump = Pump(pattern, Mailbox[Raw](256), answer, counters)
        subscription = _CoreSubscription(self._broker, _Reader(pattern, group, pump.put), pump, self._subscriptions)
        self._subscriptions.add(subscription)
        return subscription

    async def drain(self, deadline_s: float) -> None:
        try:
            async with asyncio.timeout(deadline_s):
                await asyncio.gather(*(each.drain() for each in list(self._subscriptions)))
        except TimeoutError:
            log.warning("the bus was not drained within %g s", deadline_s)

    async def close(self) -> None:
        self._closed = True
        for subscription in list(self._subscriptions):
            await subscription.unsubscribe()


class _CoreSubscription:
    def __init__(self, broker: MemoryBroker, reader: _Reader, pump: Pump[Raw], home: set[Any]) -> None:
        self._broker = broker
        self._reader = reader
        self._pump = pump
        self._home = home
        broker.add(reader)

    async def drain(self) -> None:
        self._broker.remove(self._reader)
        await self._pump.drained()

    async def unsubscribe(self) -> None:
        self._home.discard(self)
        self._broker.remove(self._reader)
        await self._pump.stop()


class _KeptSubscription:
    def __init__(
        self, broker: MemoryBroker, consumer: _Consumer, handle: Callable[[Raw], Awaitable[bool]], home: set[Any]
    ) -> None:
        self._broker = broker
        self._consumer = consumer
        self._handle = handle
        self._home = home
        self._closed = False
        self._current: _Kept | None = None
        self._task = asyncio.get_running_loop().create_task(self._run(), name=f"pull {consumer.pattern}")

    async def _run(self) -> None:
        consumer = self._consumer
        while not self._closed:
            while not consumer.waiting:
                consumer.arrived.clear()
                await consumer.arrived.wait()
            kept = self._current = consumer.waiting.popleft()
            times = consumer.deliveries[kept.seq] = consumer.deliveries.get(kept.seq, 0) + 1
            raw = Raw(kept.raw.subject, kept.raw.data, kept.raw.headers, "", times > 1, time.time_ns())
            handled = await self._handle(raw)
            self._current = None
            if handled or times >= MAX_DELIVERIES:
                consumer.deliveries.pop(kept.seq, None)
            else:
                asyncio.get_running_loop().call_later(REDELIVER_S, consumer.add, kept)

    async def drain(self) -> None:
        self._closed = True
        while self._current is not None and self._task is not asyncio.current_task():
            await asyncio.sleep(0.005)

    async def unsubscribe(self) -> None:
        self._closed = True
        self._home.discard(self)
        await cancel(self._task)
        if self._current is not None:
            # It was being handled and was never acknowledged: the next reader of a durable position gets it.
            self._consumer.add(self._current, first=True)
            self._current = None
        self._broker.forget(self._consumer)
