"""What only a real nats-server can show: rubbish on the wire, a server that is away, one that comes back empty."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from pathlib import Path

import msgpack
import nats
import pytest

from shared.bus.nats import NatsBus
from shared.bus.port import BusUnavailableError, Received
from shared.contracts import subjects
from shared.contracts.codec import encode
from shared.contracts.events import Beat, EventKind, StreamEvent
from shared.embedded import MAX_PAYLOAD, free_port
from tests.support.servers import embedded

pytestmark = pytest.mark.integration


async def until(condition: Callable[[], bool], within_s: float = 10.0) -> None:
    async with asyncio.timeout(within_s):
        while not condition():
            await asyncio.sleep(0.01)


def event(version: int, stream: str = "s") -> StreamEvent:
    return StreamEvent(stream=stream, event=EventKind.APPLIED, service="test", at_ns=1, version=version)


async def test_rubbish_is_counted_logged_once_and_dropped(
    nats_bus: NatsBus, nats_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    subject = subjects.beat("rubbish-1")
    got: list[Received] = []

    async def keep(received: Received) -> None:
        got.append(received)

    await nats_bus.subscribe(subject, keep)
    good = encode(Beat(service="test", instance="rubbish-1", incarnation="1"))
    rubbish = [b"", b"\xc1", b"not msgpack at all", good[:-3], msgpack.packb([1, 2]), msgpack.packb({"kind": "beat"})]
    raw = await nats.connect(nats_url)
    with caplog.at_level(logging.WARNING, "shared.bus"):
        for data in rubbish:
            await raw.publish(subject, data)
        await raw.publish(subject, good)
        await until(lambda: len(got) == 1)
        assert nats_bus.stats.of(subject).bad == len(rubbish)
        assert sum("bad message" in record.message for record in caplog.records) == 1
        await raw.publish(subject, b"again")
        await until(lambda: nats_bus.stats.of(subject).bad == len(rubbish) + 1)
        assert sum("bad message" in record.message for record in caplog.records) == 2
    await raw.close()


async def test_rubbish_on_a_kept_subject_does_not_come_again(nats_bus: NatsBus, nats_url: str) -> None:
    subject = subjects.stream("rubbish-2", "event")
    got: list[Received] = []

    async def keep(received: Received) -> None:
        got.append(received)

    await nats_bus.subscribe(subject, keep)
    raw = await nats.connect(nats_url)
    await raw.jetstream().publish(subject, b"\xff\xff")
    await nats_bus.publish(subject, event(1, "rubbish-2"))
    await until(lambda: len(got) == 1)
    await asyncio.sleep(0.7)
    assert nats_bus.stats.of(subject).bad == 1
    await raw.close()


async def test_the_servers_limit_is_read_from_the_server(nats_bus: NatsBus) -> None:
    assert MAX_PAYLOAD - 8192 < nats_bus.max_payload < MAX_PAYLOAD


async def test_no_server_is_one_line_with_the_url_and_the_fix_within_three_seconds() -> None:
    url = f"nats://127.0.0.1:{free_port()}"
    began = time.monotonic()
    with pytest.raises(BusUnavailableError) as raised:
        await NatsBus.connect(url)
    assert time.monotonic() - began < 3.5
    text = str(raised.value)
    assert url in text
    assert "RHEOCAST_NATS_URL" in text
    assert "\n" not in text


async def test_a_server_that_accepts_but_never_speaks_is_given_up_in_time() -> None:
    silent = await asyncio.start_server(lambda reader, writer: asyncio.sleep(30), "127.0.0.1", 0)
    port = silent.sockets[0].getsockname()[1]
    began = time.monotonic()
    with pytest.raises(BusUnavailableError):
        await NatsBus.connect(f"nats://127.0.0.1:{port}")
    assert time.monotonic() - began < 4
    silent.close()


async def test_after_a_servers_restart_both_kinds_of_subscription_work_again(tmp_path: Path) -> None:
    """Its JetStream is in memory, so the restarted server knows neither streams nor consumers."""
    with embedded(tmp_path, redis=False) as servers:
        bus = await NatsBus.connect(servers.nats_url)
        beats: list[str] = []
        versions: list[int] = []

        async def on_beat(received: Received) -> None:
            beats.append(received.message.incarnation)

        async def on_event(received: Received) -> None:
            versions.append(received.message.version)

        await bus.subscribe(subjects.beat("w"), on_beat)
        await bus.subscribe(subjects.stream("*", "event"), on_event)
        await bus.subscribe(subjects.stream("*", "control"), on_event, durable="scheduler")
        await bus.publish(subjects.stream("s", "event"), event(1))
        await until(lambda: versions == [1])

        servers.kill("nats")
        assert servers.dead() == ["nats"]
        await bus.publish(subjects.beat("w"), Beat(service="t", instance="w", incarnation="while it was away"))
        servers.start()
        await until(lambda: bus.connected)

        async def again() -> None:
            await bus.publish(subjects.beat("w"), Beat(service="t", instance="w", incarnation="back"))
            await bus.publish(subjects.stream("s", "event"), event(2))

        await asyncio.sleep(0.3)
        await again()
        await until(lambda: "back" in beats and 2 in versions, within_s=15)
        assert versions == [1, 2]
        await bus.close()


async def test_publishing_a_kept_message_fails_clearly_when_the_server_stays_away(tmp_path: Path) -> None:
    with embedded(tmp_path, redis=False) as servers:
        bus = await NatsBus.connect(servers.nats_url)
        servers.kill("nats")
        with pytest.raises(BusUnavailableError, match="no receipt"):
            await bus.publish(subjects.stream("s", "event"), event(1))
        began = time.monotonic()
        await bus.close()
        assert time.monotonic() - began < 3
