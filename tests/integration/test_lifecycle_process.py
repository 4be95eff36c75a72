"""A service as a process: it beats, is healthy, drains on SIGTERM, and never outlives its parent."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from shared.bus.nats import NatsBus
from shared.bus.port import Received
from shared.contracts import subjects
from shared.contracts.events import Beat
from shared.embedded import free_port
from shared.tensors.shm import run_prefix

pytestmark = pytest.mark.integration

ROOT = Path(__file__).resolve().parents[2]

SERVICE = """
import asyncio, sys
import numpy as np
from shared.config import ServiceSettings
from shared.lifecycle import run_service

how = sys.argv[1]

class Service:
    def __init__(self, context):
        self.context = context
    async def start(self):
        if how == "broken":
            raise ValueError("the weights are missing")
        if how == "slow-start":
            await asyncio.sleep(60)
        self.ref = self.context.tensors.put(np.zeros(1000))
        if how == "gives-up":
            self.context.fail("the camera is gone")
    def beat_fields(self):
        return {"roles": ("role",), "streams": ("s1",), "busy": 0.5}
    async def drain(self, deadline_s):
        await asyncio.sleep(60 if how == "stuck" else 0.2)
        open(sys.argv[2], "w").write("drained")
    async def close(self):
        open(sys.argv[2] + ".closed", "w").write("closed")

run_service("test", ServiceSettings(), Service)
"""


class Running:
    """One service process."""

    def __init__(self, how: str, folder: Path, env: dict[str, str], parent: bool = True) -> None:
        self.mark = folder / "mark"
        self.port = free_port()
        self.instance = f"test-{self.port}"
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "RHEOCAST_INSTANCE": self.instance,
            "RHEOCAST_HEALTH_PORT": str(self.port),
            "RHEOCAST_DRAIN_S": "1.0",
            **env,
        }
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVICE, how, str(self.mark)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def health(self, path: str) -> dict[str, object]:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=2) as answer:
            told: dict[str, object] = json.loads(answer.read())
            return told

    def until_ready(self) -> None:
        until = time.monotonic() + 15
        while time.monotonic() < until:
            with contextlib.suppress(OSError):
                self.health("/readyz")
                return
            time.sleep(0.02)
        raise AssertionError("it did not become ready")

    def end(self, timeout: float = 10) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=timeout)
        return self.process.returncode, out, err


@pytest.fixture
def start(tmp_path: Path, nats_url: str, redis_url: str, run_id: str) -> Iterator[Callable[..., Running]]:
    made: list[Running] = []
    common = {"RHEOCAST_NATS_URL": nats_url, "RHEOCAST_REDIS_URL": redis_url, "RHEOCAST_RUN_ID": run_id}

    def one(how: str, **env: str) -> Running:
        made.append(Running(how, tmp_path, {**common, **env}))
        return made[-1]

    yield one
    for each in made:
        if each.process.poll() is None:
            each.process.kill()
            each.process.communicate()


async def test_it_beats_is_ready_and_drains_on_sigterm(
    start: Callable[..., Running], nats_bus: NatsBus, run_id: str
) -> None:
    beats: list[Beat] = []

    async def hear(received: Received) -> None:
        beats.append(received.message)

    running = start("well")
    await nats_bus.subscribe(subjects.beat(running.instance), hear)
    await asyncio.to_thread(running.until_ready)
    count = len(beats)
    await asyncio.sleep(1.1)
    assert 1 <= len(beats) - count <= 5
    assert beats[-1].ready
    assert beats[-1].roles == ("role",)
    assert beats[-1].streams == ("s1",)
    assert len({beat.incarnation for beat in beats}) == 1
    told = await asyncio.to_thread(running.health, "/readyz")
    assert told["phase"] == "running"
    assert told["tensors"] == {"leased": 1, "bytes": told["tensors"]["bytes"]}  # type: ignore[index]
    running.process.send_signal(signal.SIGTERM)
    code, out, err = await asyncio.to_thread(running.end)
    assert (code, out) == (0, "")
    assert "SIGTERM: ending" in err
    assert running.mark.read_text() == "drained"
    assert Path(f"{running.mark}.closed").read_text() == "closed"
    assert not beats[-1].ready, "it told that it drains"
    assert list(Path("/dev/shm").glob(run_prefix(run_id) + "*")) == []


def test_a_drain_that_hangs_is_cut_off_at_its_deadline(start: Callable[..., Running]) -> None:
    running = start("stuck")
    running.until_ready()
    began = time.monotonic()
    running.process.send_signal(signal.SIGINT)
    code, _, err = running.end()
    assert code == 0
    assert 1.0 <= time.monotonic() - began < 4
    assert "was not drained within 1 s" in err
    assert not running.mark.exists()
    assert Path(f"{running.mark}.closed").exists()


def test_a_second_signal_does_not_wait_for_the_drain(start: Callable[..., Running]) -> None:
    running = start("stuck", RHEOCAST_DRAIN_S="30")
    running.until_ready()
    running.process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    began = time.monotonic()
    running.process.send_signal(signal.SIGTERM)
    assert running.end()[0] == 0
    assert time.monotonic() - began < 3


def test_a_start_that_is_not_over_can_be_ended(start: Callable[..., Running]) -> None:
    running = start("slow-start")
    until = time.monotonic() + 10
    while time.monotonic() < until:
        with contextlib.suppress(OSError):
            assert running.health("/healthz")["phase"] == "starting"
            break
    running.process.send_signal(signal.SIGTERM)
    assert running.end()[0] == 0
    assert Path(f"{running.mark}.closed").exists()


@pytest.mark.parametrize(("how", "text"), [("broken", "the weights are missing"), ("gives-up", "the camera is gone")])
def test_a_service_that_cannot_go_on_says_why_and_fails(start: Callable[..., Running], how: str, text: str) -> None:
    running = start(how)
    code, out, err = running.end(20)
    assert (code, out) == (1, "")
    assert text in err
    assert Path(f"{running.mark}.closed").exists()


@pytest.mark.parametrize("missing", ["NATS", "REDIS"])
def test_without_its_servers_it_ends_within_seconds_with_one_line(start: Callable[..., Running], missing: str) -> None:
    scheme = "nats" if missing == "NATS" else "redis"
    url = f"{scheme}://127.0.0.1:{free_port()}"
    running = start("well", **{f"RHEOCAST_{missing}_URL": url})
    began = time.monotonic()
    code, out, err = running.end()
    assert time.monotonic() - began < 12
    assert (code, out) == (3, "")
    assert len(err.strip().splitlines()) == 1
    assert url in err


def test_it_ends_when_its_parent_is_killed(start: Callable[..., Running]) -> None:
    """Also when it is not the parent's own child, as behind a launcher."""
    parent = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    running = start("well", RHEOCAST_PARENT_PID=str(parent.pid))
    running.until_ready()
    parent.kill()
    parent.wait()
    code, _, err = running.end()
    assert code == 0
    assert "the parent process" in err
    assert running.mark.exists()
