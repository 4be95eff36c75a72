"""What the scheduler refuses reaches the caller as what it is."""

from __future__ import annotations

import asyncio

import pytest

from services.gateway.errors import GatewayError, RefusedError, UnknownPartError
from services.gateway.handlers import Desk
from services.gateway.settings import Settings
from shared.bus.memory import MemoryBroker, MemoryBus
from shared.bus.port import BusError, Received
from shared.contracts import subjects
from shared.contracts.commands import PatternSource, StartStream, StopStream, StreamSpec
from shared.contracts.events import EventKind, StreamEvent
from shared.contracts.operating import MigrateStream
from shared.contracts.tiers import Refusal
from shared.session.memory import MemoryStore


@pytest.mark.parametrize(
    ("refusal", "error", "status"), [(Refusal.UNKNOWN, UnknownPartError, 404), (Refusal.OTHER, RefusedError, 409)]
)
async def test_a_pipeline_that_is_not_there_is_not_found(
    refusal: Refusal, error: type[GatewayError], status: int
) -> None:
    broker = MemoryBroker()
    bus, store = MemoryBus(broker), MemoryStore()
    await store.create("s", StreamSpec(source=PatternSource(), prompt="a drawing"))
    desk = Desk(bus, store, Settings())
    await desk.start()
    reason = "there is no pipeline p7; it could go to: p1"

    async def on_control(received: Received) -> None:
        asked: MigrateStream = received.message
        event = StreamEvent(
            stream="s",
            event=EventKind.REFUSED,
            service="scheduler",
            at_ns=1,
            command=asked.command,
            reason=reason,
            refusal=refusal,
        )
        await bus.publish(subjects.stream("s", "event"), event)

    await bus.subscribe(subjects.stream("s", "control"), on_control)
    with pytest.raises(error, match=reason) as raised:
        await desk.migrate("s", "p7")
    assert raised.value.status == status


@pytest.mark.parametrize("fault", [RefusedError("no room"), BusError("away"), asyncio.CancelledError()])
async def test_a_stream_whose_beginning_goes_wrong_is_stopped_again(fault: BaseException) -> None:
    bus, store = MemoryBus(MemoryBroker()), MemoryStore()
    desk = Desk(bus, store, Settings())
    await desk.start()
    heard: list[StartStream | StopStream] = []

    async def on_control(received: Received) -> None:
        heard.append(received.message)
        if isinstance(received.message, StartStream):
            await store.create("s", received.message.spec)
        told = StreamEvent(
            stream="s", event=EventKind.ACCEPTED, service="scheduler", at_ns=1, command=received.message.command
        )
        await bus.publish(subjects.stream("s", "event"), told)

    await bus.subscribe(subjects.stream("s", "control"), on_control)
    with pytest.raises(type(fault)):
        async with desk.beginning("s", StreamSpec(source=PatternSource(), prompt="a drawing")):
            raise fault
    assert [type(message) for message in heard] == [StartStream, StopStream]
