"""Addresses of NATS and Redis are shown without their passwords, right or wrong, and counters without streams' ids."""

from __future__ import annotations

import asyncio

import pytest

from shared.bus.memory import MemoryBroker, MemoryBus
from shared.bus.nats import NatsBus
from shared.bus.port import BusUnavailableError, Received
from shared.contracts import subjects
from shared.contracts.catalog import CHANNELS
from shared.contracts.sinks import Looking
from shared.credentials import without_password
from shared.session.port import StoreUnavailableError
from shared.session.redis import RedisStore

WRONG = ["{}://me:hun/ter2@127.0.0.1:1", "{}://me:hun#ter2@127.0.0.1:1", "{}://me:hun?ter2@127.0.0.1:1"]


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("nats://127.0.0.1:4222", "nats://127.0.0.1:4222"),
        ("redis://:hunter2@h:6379/0", "redis://…@h:6379/0"),
        ("redis://:hun/ter2@h:6379/0", "redis://…@h:6379/0"),
        ("redis://me:p#?@x@[::1", "redis://…@[::1"),
        ("nats://u:one@a:1,nats://u:two@b:2", "nats://…@b:2"),
        ("nothing", "nothing"),
    ],
)
def test_a_password_is_not_shown(url: str, shown: str) -> None:
    assert without_password(url) == shown


@pytest.mark.parametrize("form", WRONG)
async def test_what_is_said_of_a_wrong_address_has_no_piece_of_its_password(form: str) -> None:
    with pytest.raises(StoreUnavailableError) as store:
        await RedisStore.connect(form.format("redis"))
    with pytest.raises(BusUnavailableError) as bus:
        await NatsBus.connect(form.format("nats"))
    for told in (str(store.value), str(bus.value)):
        assert "hun" not in told
        assert "ter2" not in told


async def test_streams_that_came_and_went_leave_no_counter_behind() -> None:
    bus, heard = MemoryBus(MemoryBroker()), asyncio.Event()

    async def on(_: Received) -> None:
        heard.set()

    for number in range(50):
        heard.clear()
        subject = subjects.stream(f"s{number}", "looking")
        subscription = await bus.subscribe(subject, on)
        await bus.publish(subject, Looking(stream=f"s{number}"))
        await heard.wait()
        await subscription.unsubscribe()
    assert set(bus.stats.as_dict()) <= {channel.subject for channel in CHANNELS}
    assert bus.stats.as_dict()["rheo.stream.*.looking"]["received"] == 50
    await bus.close()
