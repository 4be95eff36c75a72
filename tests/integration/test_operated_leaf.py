"""A second host's NATS as a leaf node of the first one's, with the files that ship: what its worker says and hears."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import nats
import pytest

from shared.bus.nats import NatsBus
from shared.bus.port import BusError, Received
from shared.contracts import subjects
from shared.contracts.commands import LeaveStream
from shared.contracts.events import Beat
from shared.credentials import Credentials, read_secret
from shared.embedded import find_nats_server, free_port
from shared.operated.bus_users import DOMAIN, leaf_users_conf
from shared.operated.prepare import leaf
from tests.integration.test_operated_tls import certificate
from tests.support.compose import BACK, ROOT, services
from tests.support.operated import Operated, replaced, run_server

pytestmark = pytest.mark.integration


@dataclass(frozen=True, slots=True)
class Hosts:
    """The first host's servers, and the address of the second one's NATS."""

    front: Operated
    ca: Path
    leaf_url: str
    worker: Credentials

    @asynccontextmanager
    async def buses(self) -> AsyncIterator[tuple[NatsBus, NatsBus]]:
        """The scheduler's on the first host, a worker's on the second."""
        near = await NatsBus.connect(
            self.front.nats_url.replace("nats:", "tls:"), credentials=replace(self.front.bus("scheduler"), ca=self.ca)
        )
        far = await NatsBus.connect(self.leaf_url, domain=DOMAIN, credentials=self.worker)
        try:
            yield near, far
        finally:
            await far.close()
            await near.close()


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    folder = tmp_path_factory.mktemp("front")
    front, leaf_port = Operated(folder), free_port()
    cert, key = certificate(folder)
    pairs = (("/run/secrets/tls_cert", str(cert)), ("/run/secrets/tls_key", str(key)))
    for name, more in (("tls.conf", ()), ("hub.conf", (("0.0.0.0:7422", f"127.0.0.1:{leaf_port}"),))):
        path = folder / "nats" / name
        path.write_text(replaced(path.read_text(), *pairs, *more))
    front.nats_conf = folder / "nats" / "hub.conf"

    back, port = tmp_path_factory.mktemp("back"), free_port()
    (back / "secrets").mkdir()
    upstream = leaf(front.secrets, "127.0.0.1")
    (back / "secrets" / "upstream.conf").write_text(replaced(upstream, (":7422", f":{leaf_port}")))
    shutil.copy(ROOT / "deploy/nats/leaf-users.conf", back)
    (back / "leaf.conf").write_text(
        replaced(
            (ROOT / "deploy/nats/leaf.conf").read_text(),
            ("0.0.0.0:4222", f"127.0.0.1:{port}"),
            ("127.0.0.1:8222", f"127.0.0.1:{free_port()}"),
            ("/etc/nats/secrets/tls_ca", str(cert)),
        )
    )
    try:
        front.start("nats")
        with run_server([str(find_nats_server()), "-c", str(back / "leaf.conf")], port, back / "log"):
            who = Credentials("worker", read_secret(front.secrets / "worker" / "nats"))
            yield Hosts(front, cert, f"nats://127.0.0.1:{port}", who)
    finally:
        front.stop("nats")


def beat_of(instance: str) -> Beat:
    return Beat(service="worker", instance=instance, incarnation="i")


def test_the_files_that_ship_are_what_the_catalog_says() -> None:
    assert (ROOT / "deploy/nats/leaf-users.conf").read_text() == leaf_users_conf(), (
        "run: python -m shared.operated nats-leaf-users > deploy/nats/leaf-users.conf"
    )
    environment = services(BACK)["gpu-1"]["environment"]
    assert environment["RHEOCAST_NATS_DOMAIN"] == DOMAIN
    assert f"domain: {DOMAIN}" in (ROOT / "deploy/nats/nats.conf").read_text()


async def test_commands_come_over_from_the_first_hosts_jetstream_and_beats_go_back(hosts: Hosts) -> None:
    async with hosts.buses() as (near, far):
        commands: asyncio.Queue[str] = asyncio.Queue()
        beats: asyncio.Queue[str] = asyncio.Queue()

        async def on_command(received: Received) -> None:
            commands.put_nowait(received.message.stream)

        async def on_beat(received: Received) -> None:
            beats.put_nowait(received.message.instance)

        await far.subscribe(subjects.assign("worker"), on_command)
        await near.subscribe(subjects.beat(subjects.ANY), on_beat)
        for n in range(3):
            await near.publish(subjects.assign("worker"), LeaveStream(instance="gpu-1", stream=f"s{n}", epoch=1))
        async with asyncio.timeout(10):
            assert [await commands.get() for _ in range(3)] == ["s0", "s1", "s2"]
        async with asyncio.timeout(10):
            while beats.empty():  # interest has to cross the cable first
                await far.publish(subjects.beat("gpu-1"), beat_of("gpu-1"))
                await asyncio.sleep(0.1)
        assert beats.get_nowait() == "gpu-1"


async def test_after_the_first_hosts_nats_was_away_commands_come_again(hosts: Hosts) -> None:
    """The leaf stayed up: nobody tells its services that the consumers they read from are gone."""
    async with hosts.buses() as (near, far):
        commands: asyncio.Queue[str] = asyncio.Queue()

        async def on_command(received: Received) -> None:
            commands.put_nowait(received.message.stream)

        await far.subscribe(subjects.assign("worker"), on_command)
        hosts.front.stop("nats")
        await asyncio.sleep(0.5)
        hosts.front.start("nats")
        async with asyncio.timeout(30):
            while commands.empty():
                with suppress(BusError):
                    await near.publish(
                        subjects.assign("worker"), LeaveStream(instance="gpu-1", stream="again", epoch=1)
                    )
                await asyncio.sleep(0.5)
        assert commands.get_nowait() == "again"


async def test_the_leaf_holds_its_users_to_the_same_subjects(hosts: Hosts) -> None:
    errors: list[str] = []

    async def on_error(error: Exception) -> None:
        errors.append(str(error).lower())

    connection = await nats.connect(
        hosts.leaf_url, user="worker", password=hosts.worker.password, inbox_prefix="_INBOX_worker", error_cb=on_error
    )
    forbidden = ("rheo.egress.assign", "rheo.stream.x.control", "$JS.rheocast.API.STREAM.PURGE.RHEO_ASSIGN")
    for subject in (*forbidden, "rheo.worker.gpu-1.beat"):
        await connection.publish(subject, b"")
    await connection.subscribe("rheo.stream.x.event")
    await connection.flush()
    await asyncio.sleep(0.1)
    await connection.close()
    for subject in (*forbidden, "rheo.stream.x.event"):
        assert any(f'"{subject.lower()}"' in text for text in errors), subject
    assert not any("beat" in text for text in errors)
