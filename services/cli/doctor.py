"""``rheocast doctor``: what this machine has, what is missing, and the command that gets it."""

from __future__ import annotations

import asyncio
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import click
import psutil

from services.cli.errors import CommandError, ExitCode
from services.cli.models import listed
from services.cli.system import SHM_DIR
from services.cli.topology import usable_cores, worker_threads
from services.cli.validate import check_port, check_server, given_models_dir, models_dir_of, shown_server
from shared.embedded import ServerBinaryMissingError, find_nats_server, find_redis_server
from shared.engine.plan.registry import EMBEDDED_MODEL

PACKAGES = {
    "av": "media",
    "torch": "worker",
    "safetensors": "worker",
    "diffusers": "worker",
    "transformers": "worker",
    "ftfy": "worker",
    "fastapi": "gateway",
    "uvicorn": "gateway",
}


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report. ``fix`` is empty when all is well; only a required finding fails the report."""

    what: str
    ok: bool
    detail: str
    fix: str = ""
    required: bool = True


def _packages() -> list[Finding]:
    found: list[Finding] = []
    for package, extra in PACKAGES.items():
        present = find_spec(package) is not None
        detail = metadata.version(package) if present else "not installed"
        found.append(
            Finding(package, present, detail, "" if present else f'in the checkout: pip install -e ".[{extra}]"')
        )
    return found


def _servers() -> list[Finding]:
    return list(asyncio.run(_both_servers()))


async def _both_servers() -> tuple[Finding, Finding]:
    return await asyncio.gather(
        _server("nats-server", "NATS", "RHEOCAST_NATS_URL", find_nats_server),
        _server("redis-server", "Redis", "RHEOCAST_REDIS_URL", find_redis_server),
    )


async def _server(what: str, name: str, variable: str, find: Callable[[], Path]) -> Finding:
    """The server that a variable names must answer, as ``up`` wants it; else the embedded one must be there."""
    if url := os.environ.get(variable):
        try:
            await check_server(url, name, variable)
        except CommandError as error:
            detail, _, fix = error.line.partition("; ")
            return Finding(what, False, detail, fix)
        return Finding(what, True, f"{variable}={shown_server(url, name)}")
    try:
        return Finding(what, True, f"embedded: {find()}")
    except ServerBinaryMissingError:
        return Finding(
            what, False, "no binary found", f'in the checkout: pip install -e ".[embedded]", or set {variable}'
        )


def _device() -> Finding:
    """The device, asked of torch in another process: the command line never imports it."""
    if find_spec("torch") is None:
        return Finding("device", False, "unknown without torch", 'in the checkout: pip install -e ".[worker]"')
    code = "import torch; print(torch.cuda.get_device_name(0) if torch.cuda.is_available() else 'cpu')"
    try:
        answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    except (subprocess.SubprocessError, OSError) as error:
        return Finding("device", False, f"torch does not start: {error}", "reinstall torch")
    cores = usable_cores()
    return Finding(
        "device", True, f"{answer.stdout.strip()}, {cores} cores, {worker_threads(1, cores)} threads for one worker"
    )


def _machine() -> list[Finding]:
    memory = psutil.virtual_memory()
    shm = shutil.disk_usage(SHM_DIR) if SHM_DIR.is_dir() else None
    enough = memory.available > 2 << 30
    found = [
        Finding("python", sys.version_info >= (3, 11), platform.python_version(), "use Python 3.11 or newer"),
        Finding(
            "memory",
            enough,
            f"{memory.available >> 20} MiB free",
            "" if enough else "close other programs: 2 GiB are needed",
        ),
    ]
    if shm is None:
        found.append(Finding("shared memory", False, f"{SHM_DIR} is missing", f"mount a tmpfs on {SHM_DIR}"))
    else:
        ok = shm.free > 256 << 20
        found.append(
            Finding(
                "shared memory",
                ok,
                f"{shm.free >> 20} MiB free",
                "" if ok else "enlarge /dev/shm (docker: --shm-size=1g)",
            )
        )
    return found


def _ports() -> list[Finding]:
    try:
        check_port("127.0.0.1", 7860)
    except CommandError:
        return [Finding("port 7860", False, "in use", "rheocast up --port 7861", required=False)]
    try:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
    except OSError as error:
        return [Finding("loopback", False, str(error), "enable the loopback interface")]
    return [Finding("port 7860", True, "free")]


def _models() -> list[Finding]:
    """The embedded model must be whole; of others the ones that are there in part are worth a line."""
    found: list[Finding] = []
    absent: list[str] = []
    for line in listed(models_dir_of(given_models_dir())):
        name, parts = line["model"], line["parts"]
        if not any(parts.values()) and name != EMBEDDED_MODEL and not line["error"]:
            absent.append(name)
            continue
        missing = [part for part, path in parts.items() if path is None]
        detail = line["error"] or (f"missing: {', '.join(missing)}" if missing else f"{line['vae']} autoencoder")
        fix = "" if line["complete"] else f"rheocast models check {name}"
        found.append(Finding(f"model {name}", line["complete"], detail, fix, required=name == EMBEDDED_MODEL))
    if absent:
        detail = f"{', '.join(absent)}: not here"
        found.append(Finding("other models", False, detail, f"rheocast models fetch {absent[0]}", required=False))
    return found


def findings() -> list[Finding]:
    """Everything the doctor looks at."""
    return [*_machine(), *_packages(), *_servers(), _device(), *_ports(), *_models()]


def report(as_json: bool) -> int:
    """Print the report; 0 when nothing required is missing."""
    found = findings()
    healthy = all(finding.ok for finding in found if finding.required)
    if as_json:
        print(json.dumps({"ok": healthy, "findings": [asdict(finding) for finding in found]}))
    else:
        for finding in found:
            fix = f"   → {finding.fix}" if finding.fix and not finding.ok else ""
            mark = "ok  " if finding.ok else "MISS" if finding.required else "note"
            click.echo(f"{mark}  {finding.what:<18} {finding.detail}{fix}")
        click.echo("All is well." if healthy else "Something is missing; the arrows say how to get it.")
    return ExitCode.OK if healthy else ExitCode.FAILED
