"""Two hosts on this machine: network namespaces with one cable between them, and a Rheocast over both."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from services.cli.topology import ProcessSpec, Topology, processes
from shared.bus.nats import NatsBus
from shared.bus.port import BusUnavailableError, Received
from shared.contracts import subjects
from shared.embedded import die_with_parent, find_nats_server, find_redis_server
from tests.support.link import DEVICE, MTU, enter, opened

ROOT = Path(__file__).resolve().parents[2]
ADDRESSES = {"a": "10.77.0.1", "b": "10.77.0.2"}
READY_S = 60.0
NATS_PORT, REDIS_PORT = 4222, 6379


def why_not() -> str:
    """Why there can be no namespaces here; empty when there can."""
    if os.geteuid() != 0:
        return "two hosts need network namespaces: run as root"
    if shutil.which("ip") is None:
        return "two hosts need the `ip` command: apt-get install iproute2"
    if not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        return "two hosts need /dev/net/tun: load the kernel's tun module, or give the container that device"
    probe = f"rheo-{secrets.token_hex(3)}"
    if subprocess.run(["ip", "netns", "add", probe], capture_output=True, check=False).returncode:
        return "two hosts need network namespaces: this container may not make any (CAP_SYS_ADMIN)"
    subprocess.run(["ip", "netns", "delete", probe], capture_output=True, check=False)
    return ""


class Hosts:
    """The namespaces of hosts "a" and "b" and the cable. Made by ``hosts()``, which takes all of it away again."""

    def __init__(self) -> None:
        mark = f"{os.getpid()}-{secrets.token_hex(2)}"
        self.names = {host: f"rheo-{mark}-{host}" for host in ADDRESSES}
        self._cable: subprocess.Popen[str] | None = None

    def make(self) -> None:
        sweep()
        for name in self.names.values():
            _ip("netns", "add", name)
            _ip("-n", name, "link", "set", "lo", "up")
        command = [sys.executable, "-m", "tests.support.link", *self.names.values()]
        pipe = subprocess.PIPE
        self._cable = subprocess.Popen(
            command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True, preexec_fn=die_with_parent()
        )
        assert self._read() == "ready"
        for (host, address), peer in zip(ADDRESSES.items(), reversed(ADDRESSES.values()), strict=True):
            name = self.names[host]
            _ip("-n", name, "address", "add", address, "peer", peer, "dev", DEVICE)
            _ip("-n", name, "link", "set", DEVICE, "mtu", str(MTU), "up")

    def cable(self, delay_ms: float = 0.0, loss: float = 0.0) -> dict[str, int]:
        """How it is from now on; what it carried since the last call: ``packets``, ``lost``, ``bytes``."""
        assert self._cable is not None
        assert self._cable.stdin is not None
        self._cable.stdin.write(f"{delay_ms} {loss}\n")
        self._cable.stdin.flush()
        return json.loads(self._read())

    def _read(self) -> str:
        assert self._cable is not None
        assert self._cable.stdout is not None
        return self._cable.stdout.readline().strip()

    def at(self, host: str, *command: str) -> list[str]:
        """A command, run on that host."""
        return ["ip", "netns", "exec", self.names[host], *command]

    @contextmanager
    def inside(self, host: str) -> Iterator[None]:
        """What this thread opens meanwhile, it opens on that host."""
        own, there = opened(None), opened(self.names[host])
        try:
            enter(there)
            yield
        finally:
            enter(own)
            os.close(there)
            os.close(own)

    def remove(self) -> None:
        """End what still runs on the hosts, then the cable, then the hosts: each always tried."""
        for name in self.names.values():
            listed = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=False)
            for pid in listed.stdout.split():
                if int(pid) != os.getpid():
                    with suppress(ProcessLookupError):
                        os.kill(int(pid), signal.SIGKILL)
        if self._cable is not None:
            self._cable.kill()
            self._cable.communicate()
        for name in self.names.values():
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


def sweep() -> None:
    """Remove hosts whose test was killed outright: their names tell its process."""
    for path in Path("/run/netns").glob("rheo-*-*-?"):
        if not Path("/proc", path.name.split("-")[1]).exists():
            subprocess.run(["ip", "netns", "delete", path.name], capture_output=True, check=False)


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr}"


@contextmanager
def hosts() -> Iterator[Hosts]:
    """Two hosts, removed at the end whatever happens."""
    made = Hosts()
    try:
        made.make()
        yield made
    finally:
        made.remove()


class SpreadSystem:
    """NATS, Redis and all services on host "a", but the workers that ``place`` puts elsewhere. As much of ``System`` as a lab
    needs. Use it inside host "a"."""

    def __init__(self, hosts: Hosts, topology: Topology, folder: Path) -> None:
        self._hosts, self._folder = hosts, folder
        self._secret = secrets.token_hex(8)
        self._specs = {spec.name: spec for spec in processes(topology)}
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._ready: set[str] = set()
        self.bus: NatsBus

    async def start(self) -> None:
        self._servers()
        self.bus = await self._connected()
        await self.bus.subscribe(subjects.beat(subjects.ANY), self._on_beat)
        for name in self._specs:
            self.launch(name, "a")
        await self.ready()

    async def _on_beat(self, received: Received) -> None:
        if received.message.ready and received.message.instance in self._running:
            self._ready.add(received.message.instance)

    async def ready(self) -> None:
        until = time.monotonic() + READY_S
        while missing := set(self._specs) - self._ready:
            dead = [name for name, process in self._running.items() if process.poll() is not None]
            assert not dead, {name: self.log(name) for name in dead}
            assert time.monotonic() < until, {name: self.log(name) for name in missing}
            await asyncio.sleep(0.02)

    async def _connected(self) -> NatsBus:
        until = time.monotonic() + 10
        while True:
            try:
                return await NatsBus.connect(self.env["RHEOCAST_NATS_URL"])
            except BusUnavailableError:
                if time.monotonic() > until:
                    raise

    @property
    def env(self) -> Mapping[str, str]:
        """What every service is told."""
        address = ADDRESSES["a"]
        return {
            "RHEOCAST_NATS_URL": f"nats://rheocast:{self._secret}@{address}:{NATS_PORT}",
            "RHEOCAST_REDIS_URL": f"redis://:{self._secret}@{address}:{REDIS_PORT}/0",
            "RHEOCAST_RUN_ID": f"hosts{self._secret[:6]}",
            "RHEOCAST_PARENT_PID": str(os.getpid()),
            "PYTHONPATH": str(ROOT),
        }

    def _servers(self) -> None:
        address, data = ADDRESSES["a"], self._folder / "servers"
        data.mkdir()
        config = data / "nats.conf"
        config.write_text(
            f'listen: "{address}:{NATS_PORT}"\nauthorization {{ user: rheocast, password: "{self._secret}" }}\n'
            f'max_payload: 8MB\njetstream {{ store_dir: "{data}", max_memory_store: 64MB }}\n'
        )
        self._popen("nats", "a", [str(find_nats_server()), "-c", str(config)], {})
        redis = [str(find_redis_server()), "--bind", address, "--port", str(REDIS_PORT), "--requirepass", self._secret]
        self._popen("redis", "a", [*redis, "--save", "", "--dir", str(data)], {})

    def launch(self, name: str, host: str) -> None:
        """Start a service on a host; each has a shared memory of its own."""
        spec: ProcessSpec = self._specs[name]
        memory = self._folder / f"shm-{host}"
        memory.mkdir(exist_ok=True)
        env = {**self.env, **spec.env, "RHEOCAST_SHM_DIR": str(memory), "RHEOCAST_HEALTH_HOST": ADDRESSES[host]}
        self._popen(name, host, [sys.executable, "-m", spec.module], env)

    async def move(self, name: str, host: str) -> None:
        """Stop a service and start it on another host."""
        process = self._running.pop(name)
        process.terminate()
        await asyncio.to_thread(process.wait, 20)
        self._ready.discard(name)
        self.launch(name, host)
        await self.ready()

    def _popen(self, name: str, host: str, command: list[str], env: Mapping[str, str]) -> None:
        with (self._folder / f"{name}.log").open("ab") as log:
            self._running[name] = subprocess.Popen(
                self._hosts.at(host, *command),
                cwd=self._folder,
                env={**os.environ, **env},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                preexec_fn=die_with_parent(),
            )

    def log(self, name: str) -> str:
        """The end of a process's log."""
        return (self._folder / f"{name}.log").read_text(errors="replace")[-2000:]

    async def stop(self) -> None:
        """Services first, then the servers."""
        with suppress(Exception):
            await self.bus.close()
        order = [*(each for each in self._running if each in self._specs), "nats", "redis"]
        for group in (order[:-2], order[-2:]):
            for name in group:
                self._running[name].terminate()
            for name in group:
                try:
                    await asyncio.to_thread(self._running[name].wait, 12)
                except subprocess.TimeoutExpired:
                    self._running[name].kill()
