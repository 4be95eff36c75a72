"""The command line as a person runs it, and proof that it leaves nothing behind."""

from __future__ import annotations

import json
import os
import secrets
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
        self.run_id = f"test{secrets.token_hex(4)}"

    def _command(self, *args: str | Path) -> list[str]:
        return [sys.executable, "-m", "services.cli", *map(str, args)]

    def _env(self, env: dict[str, str] | None) -> dict[str, str]:
        root = str(Path(__file__).resolve().parents[2])
        return {**os.environ, "PYTHONPATH": root, "RHEOCAST_RUN_ID": self.run_id, **(env or {})}

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


def processes_of(run_id: str) -> list[str]:
    """Command lines of the living processes of a run, its embedded servers included."""
    found: list[str] = []
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and process.environ().get("RHEOCAST_RUN_ID") == run_id:
                found.append(" ".join(process.cmdline()))
        except psutil.Error:
            continue
    return found


def segments_of(run_id: str) -> list[str]:
    """Files of a run in shared memory."""
    return [path.name for path in Path("/dev/shm").glob(f"rheocast-{run_id}-*")]


@pytest.fixture(scope="session", autouse=True)
def _short_calibration() -> Iterator[None]:
    """Workers measure 0.2 s instead of 1 s a size when they start: some forty systems start here, and costs are learnt on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RHEOCAST_CALIBRATE_S", os.environ.get("RHEOCAST_CALIBRATE_S", "0.2"))
        yield


@pytest.fixture
def rheocast(tmp_path: Path) -> Iterator[Rheocast]:
    """The command; afterwards no process and no shared memory of it may be left."""
    command = Rheocast(tmp_path)
    yield command
    until = time.monotonic() + 5
    while time.monotonic() < until and (processes_of(command.run_id) or segments_of(command.run_id)):
        time.sleep(0.1)
    assert processes_of(command.run_id) == [], "a process was left behind"
    assert segments_of(command.run_id) == [], "shared memory was left behind"
