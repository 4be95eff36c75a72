"""The command line as a person runs it, and proof that it leaves nothing behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest


@dataclass(frozen=True, slots=True)
class Result:
    """What a command did."""

    code: int
    out: str
    err: str
    seconds: float

    @property
    def summary(self) -> dict[str, Any]:
        """The JSON line that comes last."""
        return json.loads(self.out.strip().splitlines()[-1])


class Rheocast:
    """Runs ``rheocast`` in a process of its own."""

    def __init__(self, cwd: Path) -> None:
        self._cwd = cwd

    def _command(self, *args: str | Path) -> list[str]:
        return [sys.executable, "-m", "services.cli", *map(str, args)]

    def _env(self, env: dict[str, str] | None) -> dict[str, str]:
        root = str(Path(__file__).resolve().parents[2])
        return {**os.environ, "PYTHONPATH": root, **(env or {})}

    def start(self, *args: str | Path, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
        """Start it in the background, in a session of its own."""
        return subprocess.Popen(
            self._command(*args),
            cwd=self._cwd,
            env=self._env(env),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def __call__(self, *args: str | Path, env: dict[str, str] | None = None, timeout: float = 150) -> Result:
        begin = time.monotonic()
        process = self.start(*args, env=env)
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)
            out, err = process.communicate(timeout=30)
            raise AssertionError(f"{args} did not end in {timeout} s:\n{out}\n{err}") from None
        return Result(process.returncode, out, err, time.monotonic() - begin)


def ours() -> set[int]:
    """Processes of Rheocast, its embedded servers included."""
    found: set[int] = set()
    for process in psutil.process_iter(["pid", "cmdline", "status"]):
        line = " ".join(process.info["cmdline"] or ())
        if process.info["status"] == psutil.STATUS_ZOMBIE:
            continue
        if " services." in line or ("rheocast-" in line and ("nats-server" in line or "redis-server" in line)):
            found.add(process.info["pid"])
    return found


def shared_memory() -> set[str]:
    """Our files in shared memory."""
    return {path.name for path in Path("/dev/shm").glob("rheocast-*")}


@pytest.fixture
def rheocast(tmp_path: Path) -> Iterator[Rheocast]:
    """The command; afterwards no process and no shared memory of it may be left."""
    processes, segments = ours(), shared_memory()
    yield Rheocast(tmp_path)
    until = time.monotonic() + 5
    while time.monotonic() < until and (ours() - processes or shared_memory() - segments):
        time.sleep(0.1)
    assert not ours() - processes, "a process was left behind"
    assert not shared_memory() - segments, "shared memory was left behind"
