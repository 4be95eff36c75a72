"""The real servers with the configuration that ships, in a folder and on loopback."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from shared.credentials import Credentials, read_secret
from shared.embedded import die_with_parent, find_nats_server, find_redis_server, free_port
from shared.operated.prepare import prepare
from tests.support.compose import ROOT


def replaced(text: str, *pairs: tuple[str, str]) -> str:
    """Each must be there: a setting that has gone must not go unnoticed."""
    for old, new in pairs:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


class Operated:
    """NATS and Redis as in deploy/, with secrets as ``prepare`` makes them. Only addresses and folders are others."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.secrets = folder / "secrets"
        self.nats_port, self.monitor_port, self.redis_port = free_port(), free_port(), free_port()
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        prepare(self.secrets)
        self.nats_conf, self.redis_conf = self._nats_files(), self._redis_files()

    @property
    def nats_url(self) -> str:
        return f"nats://127.0.0.1:{self.nats_port}"

    @property
    def redis_url(self) -> str:
        return f"redis://127.0.0.1:{self.redis_port}/0"

    def bus(self, user: str) -> Credentials:
        """A user's credentials for NATS."""
        return Credentials(user, read_secret(self.secrets / user / "nats"))

    def store(self, user: str) -> Credentials:
        """A user's credentials for Redis."""
        return Credentials(user, read_secret(self.secrets / user / "redis"))

    def _nats_files(self) -> Path:
        folder = self.folder / "nats"
        shutil.copytree(ROOT / "deploy/nats", folder)
        shutil.copytree(self.secrets / "nats", folder / "secrets")
        conf = folder / "nats.conf"
        conf.write_text(
            replaced(
                conf.read_text(),
                ("listen: 0.0.0.0:4222", f"listen: 127.0.0.1:{self.nats_port}"),
                ("http: 127.0.0.1:8222", f"http: 127.0.0.1:{self.monitor_port}"),
                ("store_dir: /data/nats", f"store_dir: {self.folder / 'jetstream'}"),
            )
        )
        return conf

    def _redis_files(self) -> Path:
        folder = self.folder / "redis"
        folder.mkdir()
        conf = folder / "redis.conf"
        conf.write_text(
            replaced(
                (ROOT / "deploy/redis/redis.conf").read_text(),
                ("bind * -::*", "bind 127.0.0.1"),
                ("port 6379", f"port {self.redis_port}"),
                ("dir /data/redis", f"dir {folder}"),
                ("/etc/redis/secrets", str(self.secrets / "redis")),
            )
        )
        return conf

    def start(self, name: str) -> None:
        """Start ``nats`` or ``redis`` and wait until its port is open."""
        command = {
            "nats": [str(find_nats_server()), "-c", str(self.nats_conf)],
            "redis": [str(find_redis_server()), str(self.redis_conf)],
        }[name]
        port = {"nats": self.nats_port, "redis": self.redis_port}[name]
        with self.log(name).open("ab") as log:
            self._running[name] = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, preexec_fn=die_with_parent()
            )
        wait_for_port(port, self._running[name], self.log(name))

    def stop(self, name: str, kill: bool = False) -> None:
        """End it: in order, or at once."""
        process = self._running.pop(name, None)
        if process is not None:
            process.kill() if kill else process.terminate()
            process.wait(10)

    def log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def violations(self) -> list[str]:
        """What NATS has forbidden so far, as its log tells it."""
        return [line for line in self.log("nats").read_text().splitlines() if "Violation" in line]


@contextlib.contextmanager
def run_server(command: list[str], port: int, log: Path) -> Iterator[None]:
    """A server that listens on ``port``, ended afterwards."""
    with log.open("ab") as out:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, preexec_fn=die_with_parent()
        )
    try:
        wait_for_port(port, process, log)
        yield
    finally:
        process.terminate()
        process.wait(10)


def wait_for_port(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    """Until somebody listens. AssertionError with the log's end when the process ended, or after 10 s."""
    until = time.monotonic() + 10
    while time.monotonic() < until and process.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 0.5):
            return
        time.sleep(0.02)
    raise AssertionError(f"no server on {port}: {log.read_text()[-2000:]}")


@contextlib.contextmanager
def operated(folder: Path) -> Iterator[Operated]:
    """Both running, stopped at the end whatever happens."""
    servers = Operated(folder)
    try:
        servers.start("nats")
        servers.start("redis")
        yield servers
    finally:
        servers.stop("nats")
        servers.stop("redis")
