"""The embedded servers: they start fast, answer, keep their data, and never outlive who started them."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shared import embedded
from shared.embedded import (
    EmbeddedServers,
    ServerBinaryMissingError,
    ServerFailedError,
    find_nats_server,
    find_redis_server,
)
from shared.session.redis import RedisStore
from tests.support.messages import spec

pytestmark = pytest.mark.integration

ROOT = Path(__file__).resolve().parents[2]


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"


def test_the_binaries_are_found() -> None:
    assert os.access(find_nats_server(), os.X_OK)
    assert os.access(find_redis_server(), os.X_OK)


async def test_redis_keeps_its_data_and_its_port_over_a_restart(tmp_path: Path) -> None:
    servers = EmbeddedServers(tmp_path, nats=False)
    await servers.start_async()
    try:
        url = servers.redis_url
        store = await RedisStore.connect(url)
        await store.create("s1", spec())
        await asyncio.sleep(1.2)  # it writes to disk every second
        await store.close()
        servers.kill("redis")
        assert servers.dead() == ["redis"]
        assert not servers.alive()
        await servers.start_async()
        assert servers.redis_url == url
        store = await RedisStore.connect(url)
        assert await store.streams() == ["s1"]
        await store.close()
    finally:
        servers.stop()
        servers.stop()
    assert servers.pids == {}
    with pytest.raises(RuntimeError, match="no embedded NATS"):
        _ = servers.nats_url


def test_only_loopback_is_listened_on(tmp_path: Path) -> None:
    servers = EmbeddedServers(tmp_path)
    servers.start()
    try:
        for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
            local, state = line.split()[1], line.split()[3]
            port = int(local.split(":")[1], 16)
            if state == "0A" and str(port) in servers.nats_url + servers.redis_url:
                assert local.startswith("0100007F")
    finally:
        servers.stop()


def test_a_killed_owner_leaves_no_server_behind(tmp_path: Path) -> None:
    code = (
        "import sys, time, pathlib; from shared.embedded import EmbeddedServers;"
        "servers = EmbeddedServers(pathlib.Path(sys.argv[1])); servers.start();"
        "print(*servers.pids.values(), flush=True); time.sleep(60)"
    )
    owner = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    pids = [int(pid) for pid in owner.stdout.readline().split()]
    assert len(pids) == 2
    assert all(alive(pid) for pid in pids)
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    owner.stdout.close()
    until = time.monotonic() + 5
    while any(alive(pid) for pid in pids) and time.monotonic() < until:
        time.sleep(0.02)
    assert not any(alive(pid) for pid in pids)


def test_a_server_that_ends_at_once_is_told_with_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "find_nats_server", lambda: Path("/bin/false"))
    servers = EmbeddedServers(tmp_path)
    with pytest.raises(ServerFailedError, match="nats server ended at once"):
        servers.start()
    assert servers.pids == {}


def test_a_missing_binary_names_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ServerBinaryMissingError, match=r"\[embedded\]"):
        find_nats_server()
