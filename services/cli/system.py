"""A running Rheocast on this machine: embedded servers where none are configured, the services, and a bus to talk to them."""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from services.cli.errors import CommandError, ExitCode
from services.cli.supervisor import Death, Supervisor, refuse_if_given_up
from services.cli.topology import Topology, processes
from services.cli.validate import check_server, shown_server
from shared.bus.nats import NatsBus
from shared.bus.port import BusUnavailableError, Received
from shared.config import ServiceSettings
from shared.connecting import connect_bus, connect_store
from shared.contracts import subjects
from shared.contracts.events import Beat
from shared.embedded import EmbeddedServers, ServerBinaryMissingError, ServerFailedError
from shared.session.port import StoreUnavailableError
from shared.tensors.shm import sweep_dead, sweep_run

READY_TIMEOUT_S = 120.0
LOADING_TIMEOUT_S = 1800.0  # tens of gigabytes from a slow disk
BEAT_INTERVAL_S = 0.8  # a little more than a service's own
SHM_DIR = Path("/dev/shm")  # noqa: S108 - the kernel's shared-memory file system, not a temporary folder


class System:
    """Starts and stops everything. Use as an async context manager: leaving it leaves nothing behind."""

    def __init__(
        self,
        topology: Topology,
        run_dir: Path | None = None,
        on_death: Callable[[Death], None] | None = None,
    ) -> None:
        self.topology = topology
        self.run_id = os.environ.get("RHEOCAST_RUN_ID") or secrets.token_hex(4)
        self._own_dir = run_dir is None
        self.run_dir = run_dir or Path(tempfile.mkdtemp(prefix="rheocast-"))
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self.keep_logs = False
        self._servers: EmbeddedServers | None = None
        self._on_death = on_death
        self._beats: dict[str, Beat] = {}
        self.nats_url = ""
        self.redis_url = ""
        self._supervisor: Supervisor | None = None
        self._bus: NatsBus | None = None

    @property
    def bus(self) -> NatsBus:
        """The bus, connected while the system runs."""
        if self._bus is None:
            raise RuntimeError("the system is not running")
        return self._bus

    @property
    def supervisor(self) -> Supervisor:
        """The service processes."""
        if self._supervisor is None:
            raise RuntimeError("the system is not running")
        return self._supervisor

    async def __aenter__(self) -> System:
        try:
            await self._start()
        except BaseException:
            await self.stop()
            raise
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self.keep_logs = isinstance(error, CommandError) and error.code is ExitCode.FAILED
        await self.stop()

    async def _start(self) -> None:
        sweep_dead(SHM_DIR)  # what a run that was killed outright may have left
        nats_url, redis_url = os.environ.get("RHEOCAST_NATS_URL"), os.environ.get("RHEOCAST_REDIS_URL")
        if nats_url:
            await check_server(nats_url, "NATS", "RHEOCAST_NATS_URL")
        if redis_url:
            await check_server(redis_url, "Redis", "RHEOCAST_REDIS_URL")
        if not nats_url or not redis_url:
            self._servers = EmbeddedServers(self.run_dir, nats=not nats_url, redis=not redis_url)
            try:
                await self._servers.start_async()
            except (ServerBinaryMissingError, ServerFailedError) as error:
                raise CommandError(str(error)) from None
        self.nats_url = nats_url or self._embedded().nats_url
        self.redis_url = redis_url or self._embedded().redis_url
        env = {
            "RHEOCAST_NATS_URL": self.nats_url,
            "RHEOCAST_REDIS_URL": self.redis_url,
            "RHEOCAST_RUN_ID": self.run_id,
            "RHEOCAST_SHM_DIR": str(SHM_DIR),
        }
        self._supervisor = Supervisor(processes(self.topology), env, self.run_dir / "logs", self._on_death)
        try:
            settings = ServiceSettings(nats_url=self.nats_url, redis_url=self.redis_url, instance=f"cli-{self.run_id}")
            self._bus = await connect_bus(settings)
            await (await connect_store(settings)).close()
        except BusUnavailableError as error:
            raise CommandError(f"{error}; or unset RHEOCAST_NATS_URL to use the built-in one") from None
        except ValueError as error:
            raise CommandError(str(error).splitlines()[0]) from None
        except StoreUnavailableError as error:
            raise CommandError(f"{error}; or unset RHEOCAST_REDIS_URL to use the built-in one") from None
        await self._bus.subscribe(subjects.beat(subjects.ANY), self._on_beat)
        if nats_url:
            await self._refuse_company()
        await self._supervisor.start()

    async def _refuse_company(self) -> None:
        """Instances and the leader's lease have fixed names: two systems on one NATS would take each other's work."""
        await asyncio.sleep(BEAT_INTERVAL_S)
        if self._beats:
            raise CommandError(
                f"another Rheocast ({', '.join(sorted(self._beats))}) runs on {shown_server(self.nats_url, 'NATS')}; "
                "use its API, or unset RHEOCAST_NATS_URL to start one of your own"
            )

    def _embedded(self) -> EmbeddedServers:
        if self._servers is None:
            raise RuntimeError("no embedded servers were started")
        return self._servers

    async def _on_beat(self, received: Received) -> None:
        self._beats[received.message.instance] = received.message

    def servers_alive(self) -> bool:
        """Whether the embedded NATS and Redis still run (True when others' are used)."""
        return self._servers is None or self._servers.alive()

    async def wait_ready(self, tell: Callable[[str], None] = lambda _: None) -> None:
        """Until every service has told that it is ready. Raises CommandError with the newest log line of what is not."""
        names = list(self.supervisor.children)
        own_models = self.topology.models_dir is not None
        until = time.monotonic() + (LOADING_TIMEOUT_S if own_models else READY_TIMEOUT_S)
        told = -1
        while True:
            ready = [name for name in names if name in self._beats and self._beats[name].ready]
            if len(ready) == len(names):
                return
            if len(ready) != told:
                told = len(ready)
                tell(f"starting: {told} of {len(names)} services are ready")
            refuse_if_given_up(self.supervisor)
            if time.monotonic() > until:
                late = next(name for name in names if name not in ready)
                raise CommandError(
                    f"{late} did not become ready: {self.supervisor.last_line(late)} (logs: {self.run_dir / 'logs'})",
                    ExitCode.FAILED,
                )
            await asyncio.sleep(0.05)

    async def stop(self) -> None:
        """Services, bus, servers, shared memory, run folder: in this order, each always tried. Idempotent."""
        if self._supervisor is not None:
            await self._supervisor.stop()
        if self._bus is not None:
            with suppress(Exception):
                await self._bus.close()
        if self._servers is not None:
            await asyncio.to_thread(self._servers.stop)
        sweep_run(SHM_DIR, self.run_id)
        if self._own_dir:
            kept = {"logs"} if self.keep_logs else set[str]()
            for path in list(self.run_dir.iterdir()) if self.run_dir.exists() else ():
                if path.name not in kept:
                    shutil.rmtree(path, ignore_errors=True)
            if not kept:
                shutil.rmtree(self.run_dir, ignore_errors=True)
