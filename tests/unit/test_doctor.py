"""The doctor asks the servers that are configured, and nobody is shown their passwords."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.cli import doctor, system, validate
from services.cli.errors import CommandError
from services.cli.system import System
from services.cli.topology import Topology
from services.cli.validate import check_server
from shared.contracts.events import Beat


@pytest.fixture
def listening() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def found(monkeypatch: pytest.MonkeyPatch, nats: str, redis: str) -> list[doctor.Finding]:
    monkeypatch.setenv("RHEOCAST_NATS_URL", nats)
    monkeypatch.setenv("RHEOCAST_REDIS_URL", redis)
    return doctor._servers()


def test_servers_that_answer_are_well_and_keep_their_passwords(monkeypatch: pytest.MonkeyPatch, listening: int) -> None:
    at = f"127.0.0.1:{listening}"
    nats, redis = found(monkeypatch, f"me:hunter2@{at}", f"redis://me:hun/ter2@{at}/0")
    assert (nats.what, nats.ok, nats.detail) == ("nats-server", True, f"RHEOCAST_NATS_URL=nats://…@{at}")
    assert (redis.what, redis.ok, redis.detail) == ("redis-server", True, f"RHEOCAST_REDIS_URL=redis://…@{at}/0")


def test_a_server_that_does_not_answer_is_a_finding_with_its_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        at = f"127.0.0.1:{free.getsockname()[1]}"
        nats, redis = found(monkeypatch, f"nats://me:hunter2@{at}", f"redis://{at}")
    assert (nats.ok, nats.detail) == (False, f"NATS does not answer at {at}")
    assert nats.fix == "start it, or unset RHEOCAST_NATS_URL to use the built-in one"
    assert (redis.ok, redis.required) == (False, True)
    assert "RHEOCAST_REDIS_URL" in redis.fix


def test_two_silent_servers_are_asked_at_the_same_time_and_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, most = 0, 0

    async def silent(*_: object) -> None:
        nonlocal asked, most
        asked += 1
        most = max(most, asked)
        try:
            await asyncio.sleep(60)
        finally:
            asked -= 1

    monkeypatch.setattr(validate, "ANSWER_S", 0.3)
    monkeypatch.setattr(asyncio, "open_connection", silent)
    since = time.monotonic()
    assert [finding.ok for finding in found(monkeypatch, "nats://a", "redis://b")] == [False, False]
    assert most == 2
    assert time.monotonic() - since < 30


@pytest.mark.parametrize("url", ["nats://me:hun/ter2@127.0.0.1:no", "me:hunter2@[::1", "nats://hun:1/ter2@127.0.0.1:1"])
async def test_what_is_said_of_a_wrong_address_has_no_piece_of_its_password(url: str) -> None:
    with pytest.raises(CommandError, match=r"NATS_URL") as told:
        await check_server(url, "NATS", "RHEOCAST_NATS_URL")
    assert "hun" not in told.value.line
    assert "ter2" not in told.value.line


async def test_a_second_system_is_refused_without_a_password(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system, "BEAT_INTERVAL_S", 0.0)
    second = System(Topology(model="rheo-tiny", stages=1, read_roots=(), write_roots=()), tmp_path)
    second.nats_url = "nats://me:hunter2@127.0.0.1:4222"
    second._beats["egress-0"] = Beat(service="egress", instance="egress-0", incarnation="1")
    with pytest.raises(CommandError, match=r"another Rheocast \(egress-0\) runs on nats://…@127\.0\.0\.1:4222;"):
        await second._refuse_company()
