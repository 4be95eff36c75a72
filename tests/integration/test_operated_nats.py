"""NATS with the users that ship: each service can do all that the catalog says of it, and nothing else."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path

import nats
import pytest
from nats.aio.client import Client

from shared.bus.jetstream import KEPT
from shared.bus.nats import NatsBus
from shared.bus.port import BusUnavailableError, Received
from shared.contracts import subjects
from shared.contracts.catalog import CHANNELS, Channel, Delivery
from shared.credentials import Credentials
from shared.operated.bus_users import PLATFORM, SERVICES, USERS, inbox_of, takes_part, users_conf
from shared.operated.prepare import FOLDERS, prepare
from tests.support.compose import ROOT
from tests.support.operated import Operated, operated

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Operated]:
    with operated(tmp_path_factory.mktemp("operated")) as running:
        yield running


async def plain(servers: Operated, user: str, errors: list[str]) -> Client:
    """A connection that does not know what it may do."""

    async def on_error(error: Exception) -> None:
        errors.append(str(error))

    who = servers.bus(user)
    return await nats.connect(
        servers.nats_url, user=who.user, password=who.password, inbox_prefix=inbox_of(user), error_cb=on_error
    )


def example(channel: Channel) -> str:
    return channel.subject.replace("*", "x1")


def test_the_file_that_ships_is_what_the_catalog_says() -> None:
    assert (ROOT / "deploy/nats/users.conf").read_text() == users_conf(), (
        "run: python -m shared.operated nats-users > deploy/nats/users.conf"
    )


@pytest.mark.parametrize("user", [*SERVICES, PLATFORM])
async def test_it_publishes_on_its_own_subjects_and_on_no_others(servers: Operated, user: str) -> None:
    errors: list[str] = []
    connection = await plain(servers, user, errors)
    for channel in CHANNELS:
        await connection.publish(example(channel), b"")
    await connection.publish("rheo.nothing.of.the.kind", b"")
    await connection.publish(f"{inbox_of('scheduler')}.x.y", b"")
    await connection.flush()
    await asyncio.sleep(0.1)
    await connection.close()
    refused = {
        channel.subject
        for channel in CHANNELS
        if any(f'publish to "{example(channel)}"' in text.lower() for text in errors)
    }
    assert refused == {channel.subject for channel in CHANNELS if not takes_part(user, channel.senders)}
    assert any("rheo.nothing.of.the.kind" in text for text in errors)
    assert user == "scheduler" or any("_inbox_scheduler" in text.lower() for text in errors)


@pytest.mark.parametrize("user", SERVICES)
async def test_it_hears_its_own_subjects_and_nobody_elses_replies(servers: Operated, user: str) -> None:
    errors: list[str] = []
    connection = await plain(servers, user, errors)
    for channel in CHANNELS:
        await connection.subscribe(example(channel))
    await connection.subscribe(f"{inbox_of('worker' if user != 'worker' else 'egress')}.>")
    await connection.subscribe("rheo.>")
    await connection.flush()
    await asyncio.sleep(0.1)
    await connection.close()
    refused = {
        channel.subject
        for channel in CHANNELS
        if any(f'subscription to "{example(channel)}"' in text.lower() for text in errors)
    }
    may = {
        channel.subject
        for channel in CHANNELS
        if takes_part(user, channel.readers) and channel.delivery is not Delivery.JETSTREAM
    }
    assert refused == {channel.subject for channel in CHANNELS} - may
    assert any("_inbox_" in text.lower() for text in errors)
    assert any('"rheo.>"' in text for text in errors)


@pytest.mark.parametrize("user", SERVICES)
async def test_it_reads_what_is_kept_for_it_and_nothing_else(servers: Operated, user: str) -> None:
    """Over the bus as services use it: JetStream's consumers carry in their subject what they are to read."""
    bus = await NatsBus.connect(servers.nats_url, credentials=servers.bus(user))

    async def ignore(_: Received) -> None: ...

    patterns = {
        **{subjects.assign(service): service == user for service in ("ingest", "worker", "egress", "motion")},
        subjects.stream("*", "control"): user == "scheduler",
        subjects.stream("*", "event"): user in ("scheduler", "gateway", "egress"),
        subjects.assign("*"): False,
    }

    async def may_read(pattern: str) -> bool:
        try:
            async with asyncio.timeout(1.0):  # what is forbidden is not answered
                await bus.subscribe(pattern, ignore)
        except (BusUnavailableError, TimeoutError):
            return False
        return True

    try:
        found = await asyncio.gather(*(may_read(pattern) for pattern in patterns))
        assert dict(zip(patterns, found, strict=True)) == patterns
    finally:
        await bus.close()


async def test_nobody_changes_or_empties_what_is_kept(servers: Operated) -> None:
    errors: list[str] = []
    connection = await plain(servers, "worker", errors)
    for kept in KEPT:
        for what in ("DELETE", "PURGE", "UPDATE", "MSG.GET", "MSG.DELETE"):
            await connection.publish(f"$JS.API.STREAM.{what}.{kept.name}", b"{}")
    await connection.publish("$JS.API.STREAM.CREATE.OTHER", b"{}")
    await connection.flush()
    await asyncio.sleep(0.1)
    await connection.close()
    assert len([text for text in errors if "$js.api.stream" in text.lower()]) == 5 * len(KEPT) + 1


async def test_who_has_no_password_or_a_wrong_one_is_told_what_to_set(servers: Operated) -> None:
    tries = (
        NatsBus.connect(servers.nats_url, credentials=who) for who in (Credentials(), Credentials("worker", "wrong"))
    )
    for outcome in await asyncio.gather(*tries, return_exceptions=True):
        assert isinstance(outcome, BusUnavailableError)
        assert "RHEOCAST_NATS_PASSWORD_FILE" in str(outcome)


async def test_limits_are_those_of_the_file(servers: Operated) -> None:
    bus = await NatsBus.connect(servers.nats_url, credentials=servers.bus("gateway"), on_disk=True)
    assert 7 << 20 < bus.max_payload <= 8 << 20
    await bus.close()


def test_every_user_has_a_password_and_making_them_again_changes_nothing(servers: Operated, tmp_path: Path) -> None:
    prepare(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(FOLDERS)
    before = {path: path.read_text() for path in tmp_path.rglob("*") if path.is_file()}
    passwords = {(tmp_path / user / "nats").read_text() for user in USERS}
    assert len(passwords) == len(USERS)
    assert all(path.stat().st_mode & 0o777 == 0o400 for path in before)
    # A container that was cut off in the middle leaves its temporary file, and its successor has the same number.
    (tmp_path / "redis" / f".users.acl.{os.getpid()}").touch(mode=0o400)
    prepare(tmp_path)
    assert {path: path.read_text() for path in tmp_path.rglob("*") if path.is_file()} == before
