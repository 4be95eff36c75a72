"""One suite that every bus must pass: in memory, over a real nats-server, and each of them under a lossy wrapper without
faults."""

from __future__ import annotations

import asyncio
import random
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from opentelemetry import trace

from shared.bus.lossy import Faults, LossyBus
from shared.bus.memory import MemoryBroker, MemoryBus
from shared.bus.nats import NatsBus
from shared.bus.port import (
    Bus,
    MessageTooLargeError,
    NoResponderError,
    Overflow,
    Received,
    RequestFailedError,
    RequestTimeoutError,
)
from shared.contracts import subjects
from shared.contracts.commands import StopStream, TensorGet, TensorPart
from shared.contracts.events import Beat, EventKind, SourceEnded, SourceTotals, StreamEvent
from shared.telemetry.propagation import TRACEPARENT

Connect = Callable[[], Awaitable[Bus]]

pytestmark = [
    pytest.mark.integration,
    pytest.mark.parametrize("kind", ["memory", "nats", "lossy-memory", "lossy-nats"], indirect=True),
]


@pytest.fixture
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
async def connect(kind: str, request: pytest.FixtureRequest) -> AsyncIterator[Connect]:
    """Makes clients of one broker; closes them afterwards."""
    broker = MemoryBroker()
    url = request.getfixturevalue("nats_url") if kind.endswith("nats") else ""
    made: list[Bus] = []

    async def one() -> Bus:
        bus: Bus = await NatsBus.connect(url) if url else MemoryBus(broker)
        if kind.startswith("lossy"):
            bus = LossyBus(bus, Faults(), random.Random(1))
        made.append(bus)
        return bus

    yield one
    for bus in made:
        await bus.close()


@pytest.fixture
def stream() -> str:
    """A stream of its own, since the nats-server is shared by all tests."""
    return f"s{uuid.uuid4().hex[:8]}"


def ended(stream: str, chunk: int) -> SourceEnded:
    return SourceEnded(stream=stream, epoch=1, totals=SourceTotals(chunks=chunk))


def event(stream: str, version: int) -> StreamEvent:
    return StreamEvent(stream=stream, event=EventKind.APPLIED, service="test", at_ns=1, version=version)


async def until(condition: Callable[[], bool], within_s: float = 5.0) -> None:
    """Wait for something that must come true."""
    async with asyncio.timeout(within_s):
        while not condition():
            await asyncio.sleep(0.005)


class Collector:
    """A handler that keeps what it got."""

    def __init__(self) -> None:
        self.received: list[Received] = []

    async def __call__(self, received: Received) -> None:
        self.received.append(received)

    def __len__(self) -> int:
        return len(self.received)

    @property
    def chunks(self) -> list[int]:
        return [each.message.totals.chunks for each in self.received]

    @property
    def versions(self) -> list[int]:
        return [each.message.version for each in self.received]


async def settle(bus: Bus) -> None:
    """Until a subscription just made is known to the broker: publish and hear a beat of one's own."""
    name = f"settle-{uuid.uuid4().hex[:8]}"
    heard = Collector()
    subscription = await bus.subscribe(subjects.beat(name), heard)
    while not heard:
        await bus.publish(subjects.beat(name), Beat(service="test", instance=name, incarnation="1"))
        await asyncio.sleep(0.01)
    await subscription.unsubscribe()


async def test_messages_arrive_in_order_and_typed(connect: Connect, stream: str) -> None:
    sender, reader = await connect(), await connect()
    got = Collector()
    pattern = subjects.stream("*", "chunk")
    await reader.subscribe(pattern, got)
    await settle(reader)
    for number in range(200):
        await sender.publish(subjects.stream(stream, "chunk"), ended(stream, number))
    await until(lambda: len(got) == 200)
    assert got.chunks == list(range(200))
    first = got.received[0]
    assert first.message == ended(stream, 0)
    assert first.subject == subjects.stream(stream, "chunk")
    assert first.received_ns > 0
    assert not first.redelivered
    assert reader.stats.of(pattern).received == 200
    assert sender.stats.of(pattern).published == 200


async def test_a_pattern_hears_only_what_it_names(connect: Connect, stream: str) -> None:
    bus = await connect()
    one, all_of = Collector(), Collector()
    await bus.subscribe(subjects.stream(stream, "chunk"), one)
    await bus.subscribe(subjects.stream("*", "chunk"), all_of)
    await settle(bus)
    await bus.publish(subjects.stream(stream + "x", "chunk"), ended(stream, 1))
    await bus.publish(subjects.stream(stream, "chunk"), ended(stream, 2))
    await until(lambda: len(all_of) == 2)
    assert one.chunks == [2]


async def test_the_wrong_message_for_a_subject_is_refused_at_the_sender(connect: Connect, stream: str) -> None:
    bus = await connect()
    with pytest.raises(TypeError, match="StreamEvent may not be sent on"):
        await bus.publish(subjects.stream(stream, "chunk"), event(stream, 1))
    with pytest.raises(LookupError, match="not in the catalog"):
        await bus.publish("rheo.nowhere", event(stream, 1))


async def test_a_group_shares_its_messages(connect: Connect, stream: str) -> None:
    sender, first, second = await connect(), await connect(), await connect()
    one, two, alone = Collector(), Collector(), Collector()
    await first.subscribe(subjects.stream(stream, "chunk"), one, group="g")
    await second.subscribe(subjects.stream(stream, "chunk"), two, group="g")
    await second.subscribe(subjects.stream(stream, "chunk"), alone)
    await settle(first)
    await settle(second)
    for number in range(60):
        await sender.publish(subjects.stream(stream, "chunk"), ended(stream, number))
    await until(lambda: len(one) + len(two) == 60 and len(alone) == 60)
    assert sorted(one.chunks + two.chunks) == list(range(60))
    assert one.chunks
    assert two.chunks


@pytest.mark.parametrize(
    ("overflow", "kept"), [(Overflow.DROP_NEWEST, [0, 1, 2, 3]), (Overflow.DROP_OLDEST, [0, 17, 18, 19])]
)
async def test_a_full_mailbox_drops_by_its_policy_and_counts(
    connect: Connect, stream: str, overflow: Overflow, kept: list[int]
) -> None:
    sender, reader = await connect(), await connect()
    if isinstance(reader, LossyBus):
        reader = reader.bus  # the wrapper itself empties the mailbox as fast as it fills
    gate, got = asyncio.Event(), Collector()

    async def slow(received: Received) -> None:
        await got(received)
        await gate.wait()

    pattern = subjects.stream(stream, "chunk")
    await reader.subscribe(pattern, slow, size=3, overflow=overflow)
    await settle(reader)
    await sender.publish(pattern, ended(stream, 0))
    await until(lambda: len(got) == 1)
    for number in range(1, 20):
        await sender.publish(pattern, ended(stream, number))
    await until(lambda: reader.stats.of(pattern).dropped == 16)
    gate.set()
    await until(lambda: len(got) == 4)
    assert got.chunks == kept


async def test_a_handler_that_raises_is_counted_and_the_next_message_is_handled(connect: Connect, stream: str) -> None:
    bus, got = await connect(), Collector()

    async def fussy(received: Received) -> None:
        if received.message.totals.chunks == 1:
            raise ValueError("not this one")
        await got(received)

    pattern = subjects.stream(stream, "chunk")
    await bus.subscribe(pattern, fussy)
    await settle(bus)
    for number in range(3):
        await bus.publish(pattern, ended(stream, number))
    await until(lambda: len(got) == 2)
    assert got.chunks == [0, 2]
    assert bus.stats.of(pattern).handler_errors == 1


async def test_unsubscribing_ends_it_even_from_inside_the_handler(connect: Connect, stream: str) -> None:
    bus, got = await connect(), Collector()
    pattern = subjects.stream(stream, "chunk")

    async def once(received: Received) -> None:
        await got(received)
        await subscription.unsubscribe()

    subscription = await bus.subscribe(pattern, once)
    await settle(bus)
    for number in range(3):
        await bus.publish(pattern, ended(stream, number))
    await settle(bus)
    await subscription.unsubscribe()
    assert got.chunks == [0]


async def test_handlers_run_in_the_senders_trace(connect: Connect, stream: str) -> None:
    bus = await connect()
    seen: list[int] = []

    async def look(_: Received) -> None:
        seen.append(trace.get_current_span().get_span_context().trace_id)

    pattern = subjects.stream(stream, "chunk")
    await bus.subscribe(pattern, look)
    await settle(bus)
    parent = f"00-{0xABCDEF:032x}-{0x1234:016x}-01"
    await bus.publish(pattern, ended(stream, 1), headers={TRACEPARENT: parent})
    await bus.publish(pattern, ended(stream, 2))
    await until(lambda: len(seen) == 2)
    assert seen == [0xABCDEF, 0]


async def test_a_request_gets_its_reply(connect: Connect) -> None:
    asker, server = await connect(), await connect()
    owner = f"o{uuid.uuid4().hex[:8]}"

    async def serve(received: Received) -> TensorPart:
        return TensorPart(data=bytes(received.message.length), total=received.message.slot)

    await server.serve(subjects.tensor_get(owner), serve)
    await settle(server)
    reply = await asker.request(
        subjects.tensor_get(owner), TensorGet(slot=7, generation=1, start=0, length=900_000), 2.0
    )
    assert reply == TensorPart(data=bytes(900_000), total=7)


async def test_a_request_that_nobody_serves_fails_at_once(connect: Connect) -> None:
    bus = await connect()
    with pytest.raises(NoResponderError, match="nobody serves"):
        await bus.request(
            subjects.tensor_get(f"x{uuid.uuid4().hex[:8]}"), TensorGet(slot=0, generation=0, start=0, length=1), 2.0
        )


async def test_a_request_fails_with_its_servers_error_or_in_time(connect: Connect) -> None:
    asker, server = await connect(), await connect()
    owner = f"o{uuid.uuid4().hex[:8]}"

    async def serve(received: Received) -> TensorPart:
        if received.message.slot == 1:
            raise KeyError("no such slot")
        await asyncio.sleep(0.4)
        return TensorPart()

    await server.serve(subjects.tensor_get(owner), serve)
    await settle(server)
    with pytest.raises(RequestFailedError, match="no such slot"):
        await asker.request(subjects.tensor_get(owner), TensorGet(slot=1, generation=0, start=0, length=1), 2.0)
    with pytest.raises(RequestTimeoutError, match=r"within 0\.1 s"):
        await asker.request(subjects.tensor_get(owner), TensorGet(slot=2, generation=0, start=0, length=1), 0.1)


async def test_a_message_over_the_brokers_limit_is_refused_with_the_limit(connect: Connect, stream: str) -> None:
    bus = await connect()
    huge = StreamEvent(
        stream=stream, event=EventKind.WARNING, service="test", at_ns=1, reason="x" * (bus.max_payload + 1)
    )
    with pytest.raises(MessageTooLargeError, match=f"max_payload of {bus.max_payload}"):
        await bus.publish(subjects.stream(stream, "event"), huge)


async def test_a_new_subscriber_of_kept_messages_hears_only_new_ones_unless_it_asks_for_all(
    connect: Connect, stream: str
) -> None:
    sender, reader = await connect(), await connect()
    subject = subjects.stream(stream, "event")
    await sender.publish(subject, event(stream, 1))
    await sender.publish(subject, event(stream, 2))
    late, whole = Collector(), Collector()
    await reader.subscribe(subject, late)
    await reader.subscribe(subject, whole, replay=True)
    await sender.publish(subject, event(stream, 3))
    await until(lambda: len(whole) == 3 and len(late) == 1)
    assert whole.versions == [1, 2, 3]
    assert late.versions == [3]


async def test_kept_messages_are_not_dropped_however_slow_the_reader(connect: Connect, stream: str) -> None:
    sender, reader, got = await connect(), await connect(), Collector()

    async def slow(received: Received) -> None:
        await asyncio.sleep(0.001)
        await got(received)

    subject = subjects.stream(stream, "event")
    await reader.subscribe(subject, slow, size=1)
    for number in range(100):
        await sender.publish(subject, event(stream, number))
    await until(lambda: len(got) == 100)
    assert got.versions == list(range(100))
    assert reader.stats.total("dropped") == 0


async def test_a_durable_position_outlives_its_reader(connect: Connect, stream: str) -> None:
    sender, before, after = await connect(), await connect(), await connect()
    subject, name = subjects.stream(stream, "control"), f"d{stream}"
    first, second = Collector(), Collector()
    subscription = await before.subscribe(subject, first, durable=name)
    await sender.publish(subject, StopStream(command="a", stream=stream))
    await until(lambda: len(first) == 1)
    await asyncio.sleep(0.05)  # let the acknowledgement pass
    await subscription.unsubscribe()
    await before.close()
    await sender.publish(subject, StopStream(command="b", stream=stream))
    await after.subscribe(subject, second, durable=name)
    await until(lambda: len(second) == 1)
    assert [each.message.command for each in first.received + second.received] == ["a", "b"]


async def test_a_kept_message_whose_handler_raised_comes_again_marked_so(connect: Connect, stream: str) -> None:
    bus, got = await connect(), Collector()

    async def fails_once(received: Received) -> None:
        await got(received)
        if not received.redelivered:
            raise RuntimeError("the store was away for a moment")

    subject = subjects.stream(stream, "event")
    await bus.subscribe(subject, fails_once)
    await bus.publish(subject, event(stream, 1))
    await until(lambda: len(got) == 2)
    await asyncio.sleep(0.7)
    assert [each.redelivered for each in got.received] == [False, True]


async def test_a_kept_message_that_always_fails_is_given_up_after_three_tries(connect: Connect, stream: str) -> None:
    bus, got = await connect(), Collector()

    async def fails(received: Received) -> None:
        await got(received)
        raise RuntimeError("never")

    subject = subjects.stream(stream, "event")
    await bus.subscribe(subject, fails)
    await bus.publish(subject, event(stream, 1))
    await until(lambda: len(got) == 3)
    await asyncio.sleep(0.8)
    assert len(got) == 3
    assert bus.stats.of(subject).handler_errors == 3


async def test_kept_messages_are_shared_by_a_group(connect: Connect, stream: str) -> None:
    sender, first, second = await connect(), await connect(), await connect()
    one, two = Collector(), Collector()
    subject = subjects.stream(stream, "event")

    def worker(into: Collector) -> Callable[[Received], Awaitable[None]]:
        async def work(received: Received) -> None:
            await into(received)
            await asyncio.sleep(0.005)

        return work

    await first.subscribe(subject, worker(one), group=f"g{stream}")
    await second.subscribe(subject, worker(two), group=f"g{stream}")
    for number in range(20):
        await sender.publish(subject, event(stream, number))
    await until(lambda: len(one) + len(two) == 20)
    assert sorted(one.versions + two.versions) == list(range(20))
    assert one.versions
    assert two.versions


async def test_draining_finishes_what_waits_and_takes_nothing_new(connect: Connect, stream: str) -> None:
    sender, reader, got = await connect(), await connect(), Collector()

    async def slow(received: Received) -> None:
        await asyncio.sleep(0.005)
        await got(received)

    subject = subjects.stream(stream, "chunk")
    await reader.subscribe(subject, slow)
    await settle(reader)
    for number in range(20):
        await sender.publish(subject, ended(stream, number))
    await until(lambda: reader.stats.of(subject).received >= 1)
    await asyncio.sleep(0.05)
    await reader.drain(5.0)
    assert got.chunks == list(range(20))
    await sender.publish(subject, ended(stream, 99))
    await asyncio.sleep(0.05)
    assert len(got) == 20
    await reader.drain(1.0)
    await reader.close()
    await reader.close()
