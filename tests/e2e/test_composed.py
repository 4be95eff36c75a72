"""compose.yaml without Docker: its commands with its environments, on the real servers with the configuration and users that
ship. Addresses and folders are replaced, and nothing else."""

from __future__ import annotations

import asyncio
import os
import secrets
import subprocess
import sys
import time
import urllib.request
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import psutil
import pytest
import pytest_asyncio

from shared.client import Api, Broker
from shared.contracts.commands import Mp4Sink, PatternSource, StreamSpec
from shared.contracts.views import StreamView
from shared.embedded import die_with_parent, free_port
from shared.tensors.shm import sweep_run
from tests.support.compose import COMPOSE, Service, module_of, ours, services
from tests.support.lab import frames_of
from tests.support.operated import Operated, operated

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(150)]

LOOPBACK = ("RHEOCAST_HEALTH_HOST", "RHEOCAST_GATEWAY_HOST", "RHEOCAST_RTMP_HOST", "RHEOCAST_RTC_HOSTS")


class Composed:
    """The services that run without a profile."""

    def __init__(self, servers: Operated) -> None:
        self.servers = servers
        self.run_id = f"test{secrets.token_hex(4)}"
        self.media = servers.folder / "media"
        self.media.mkdir()
        (servers.folder / "models").mkdir()
        self.found = {name: service for name, service in ours(services(COMPOSE)).items() if "profiles" not in service}
        self.ports = {name: free_port() for name in self.found}
        self.api_port = free_port()
        self.running: dict[str, subprocess.Popen[bytes]] = {}

    def environment(self, name: str, service: Service) -> dict[str, str]:
        """As compose gives it, on loopback and in this run's folders."""
        user = module_of(service).removeprefix("services.")
        given = {key: "" if value is None else str(value) for key, value in service["environment"].items()}
        given |= dict.fromkeys(given.keys() & set(LOOPBACK), "127.0.0.1")
        folders = {
            "/secrets": self.servers.secrets / user,
            "/media": self.media,
            "/models": self.servers.folder / "models",
        }
        for key, value in given.items():
            for folder, here in folders.items():
                if value == folder or value.startswith(f"{folder}/"):
                    given[key] = str(here) + value.removeprefix(folder)
        return given | {
            "RHEOCAST_NATS_URL": given["RHEOCAST_NATS_URL"].replace("nats:4222", f"127.0.0.1:{self.servers.nats_port}"),
            "RHEOCAST_REDIS_URL": given["RHEOCAST_REDIS_URL"].replace(
                "redis:6379", f"127.0.0.1:{self.servers.redis_port}"
            ),
            "RHEOCAST_RUN_ID": self.run_id,
            "RHEOCAST_HEALTH_PORT": str(self.ports[name]),
            **({"RHEOCAST_GATEWAY_PORT": str(self.api_port)} if user == "gateway" else {}),
        }

    def start(self) -> None:
        for name, service in self.found.items():
            with (self.servers.folder / f"{name}.log").open("ab") as log:
                self.running[name] = subprocess.Popen(
                    [sys.executable, *service["command"][1:]],
                    env={"PATH": os.environ["PATH"], **self.environment(name, service)},
                    cwd=self.servers.folder,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    preexec_fn=die_with_parent(),
                )

    def healthy(self, name: str) -> bool:
        """What compose's health check says, on the port that this one has here."""
        code = self.found[name]["healthcheck"]["test"][-1].replace(":8080/", f":{self.ports[name]}/")
        return subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=20).returncode == 0

    async def until_healthy(self) -> None:
        until, waiting = time.monotonic() + 90, list(self.found)
        while waiting:
            waiting = [name for name in waiting if not await asyncio.to_thread(self.healthy, name)]
            for name in waiting:
                assert self.running[name].poll() is None, self.tail(name)
                assert time.monotonic() < until, self.tail(name)

    def tail(self, name: str) -> str:
        return f"{name}: {(self.servers.folder / f'{name}.log').read_text()[-1500:]}"

    async def stop(self) -> None:
        for process in self.running.values():
            process.terminate()
        for process in self.running.values():
            try:
                await asyncio.to_thread(process.wait, 15)
            except subprocess.TimeoutExpired:
                process.kill()
        sweep_run("/dev/shm", self.run_id)


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def composed(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Composed]:
    with operated(tmp_path_factory.mktemp("composed")) as servers:
        system = Composed(servers)
        try:
            system.start()
            await system.until_healthy()
            yield system
        finally:
            await system.stop()


async def until(api: Api, stream: str, wanted: Callable[[StreamView], bool]) -> StreamView:
    """Until the API shows it; what cannot be answered meanwhile is asked again."""
    view: StreamView | None = None
    for _ in range(300):
        try:
            view = await api.stream(stream)
        except Exception:
            await asyncio.sleep(0.1)
            continue
        if wanted(view):
            return view
        assert view.state not in ("failed", "stopped"), view
        await asyncio.sleep(0.1)
    raise AssertionError(view)


def shown(view: StreamView) -> int:
    return view.ledger.on_time + view.ledger.late


async def test_a_live_stream_goes_on_while_nats_and_redis_are_restarted(composed: Composed) -> None:
    servers = composed.servers
    spec = StreamSpec(
        source=PatternSource(),
        sinks=(Mp4Sink(path="out.mp4"),),
        prompt="a pencil drawing",
        width=160,
        height=96,
        fps=8,
        deadline_ms=2000,
    )
    async with Api(f"http://127.0.0.1:{composed.api_port}") as api:
        view = await api.start(spec)
        view = await until(api, view.id, lambda view: shown(view) >= 12)
        servers.stop("nats")
        await asyncio.sleep(2.5)  # longer than an instance may be silent
        servers.start("nats")
        before = shown(view)
        view = await until(api, view.id, lambda view: shown(view) >= before + 24)
        servers.stop("redis", kill=True)
        await asyncio.sleep(1.5)
        servers.start("redis")
        before = shown(view)
        view = await until(api, view.id, lambda view: shown(view) >= before + 24)
        await api.stop(view.id)
        view = await api.ended(view.id)
    assert view.state == "stopped", view.reason
    totals = view.ledger
    assert totals.closed == totals.frames_in
    assert totals.dropped_total > 0, "two seconds without NATS are a gap, and the ledger tells it"
    assert len(frames_of(composed.media / "out.mp4")) >= 60
    assert servers.violations() == [], "nobody asked for more than its user may do"
    assert {process.pid for process in composed.running.values() if process.poll() is None} == {
        process.pid for process in composed.running.values()
    }, "nobody was restarted"


async def test_a_platform_uses_the_bus_as_its_own_user(composed: Composed) -> None:
    password = composed.servers.bus("platform").password
    async with (
        Api(f"http://127.0.0.1:{composed.api_port}") as api,
        Broker.connect(f"nats://platform:{password}@127.0.0.1:{composed.servers.nats_port}") as broker,
        broker.events() as events,
    ):
        view = await api.start(StreamSpec(source=PatternSource(frames=9), prompt="ink", width=160, height=96, fps=8))
        seen: set[str] = set()
        async with asyncio.timeout(40):
            async for event in events:
                if event.stream == view.id:
                    seen.add(event.event.value)
                if event.event.value in ("stopped", "failed"):
                    break
    assert {"accepted", "stopped"} <= seen
    assert composed.servers.violations() == []


async def test_services_hold_no_secret_in_their_environment(composed: Composed) -> None:
    passwords = {
        path.read_text().strip() for path in composed.servers.secrets.glob("*/*") if path.name in ("nats", "redis")
    }
    for process in composed.running.values():
        told = " ".join([*psutil.Process(process.pid).environ().values(), *psutil.Process(process.pid).cmdline()])
        assert not any(password in told for password in passwords)


async def test_metrics_are_where_health_is(composed: Composed) -> None:
    for name, port in composed.ports.items():
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
            assert b"rheocast_" in answer.read(), name


async def test_the_folder_of_media_is_the_only_one_written(composed: Composed) -> None:
    """Roots are read-only: what a service leaves in its working folder would fail there."""
    assert {path.name for path in Path(composed.servers.folder).iterdir() if path.is_dir()} <= {
        *("nats", "redis", "secrets", "media", "models", "jetstream"),
    }
