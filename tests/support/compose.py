"""compose.yaml and its overlays as the tests read them: variables filled in with their defaults, files merged."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
COMPOSE = ROOT / "compose.yaml"
OVERLAYS = tuple(sorted((ROOT / "deploy/compose").glob("*.yaml")))
TLS = ROOT / "deploy/compose/tls.yaml"
FRONT = ROOT / "deploy/compose/two-hosts/front.yaml"
GPUS = ("two-gpus", "four-gpus")
BACK = ROOT / "deploy/compose/two-hosts/back.yaml"
"""The second of two hosts: a file of its own, on top of nothing."""
WAYS: dict[str, tuple[Path, ...]] = {
    "compose": (COMPOSE,),
    **{path.stem: (COMPOSE, path) for path in OVERLAYS if not path.stem.startswith("tls-")},
    **{f"tls-{gpus}": (COMPOSE, TLS.with_stem(gpus), TLS, TLS.with_stem(f"tls-{gpus}")) for gpus in GPUS},
    "front": (COMPOSE, TLS, FRONT),
    "back": (BACK,),
}
"""The files that are used together, by a name."""
NAMES = ("gateway", "ingest", "motion", "scheduler", "worker", "egress")
NOT_OURS = {"OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}
_VARIABLE = re.compile(r"\$\{([A-Z_0-9]+)(?::([-?])([^}]*))?\}")

Service = dict[str, Any]


def variables(path: Path) -> dict[str, str | None]:
    """The variables that a file reads, with their defaults; None: must be given."""
    return {name: default if kind == "-" else None for name, kind, default in _VARIABLE.findall(_uncommented(path))}


def _uncommented(path: Path) -> str:
    return "\n".join(line for line in path.read_text().splitlines() if not line.lstrip().startswith("#"))


def filled(path: Path, **given: str) -> dict[str, Any]:
    """A file with its variables filled in: from ``given``, else by their defaults, else by their own names."""

    def value(match: re.Match[str]) -> str:
        name, kind, default = match.groups()
        return given.get(name, default if kind == "-" else name.lower())

    return yaml.safe_load(_VARIABLE.sub(value, _uncommented(path)))


def services(*paths: Path) -> dict[str, Service]:
    """The services of the files, later ones over earlier ones as compose merges them: maps by key, lists added."""
    merged: dict[str, Service] = {}
    for path in paths:
        for name, service in filled(path)["services"].items():
            if service is None:
                continue
            merged[name] = _merge(merged[name], service) if name in merged else service
    return merged


def _merge(old: Any, new: Any) -> Any:
    if isinstance(old, dict) and isinstance(new, dict):
        return {
            key: _merge(old[key], new[key]) if key in old and key in new else {**old, **new}[key]
            for key in {**old, **new}
        }
    if isinstance(old, list) and isinstance(new, list):
        return [*old, *new]
    return new


def module_of(service: Service) -> str:
    """The module that a service of ours runs, "" for what is none."""
    command = service.get("command") or []
    return str(command[2]) if command[:2] == ["python", "-m"] else ""


def ours(found: dict[str, Service]) -> dict[str, Service]:
    """Those that run one of the six services."""
    return {name: service for name, service in found.items() if module_of(service).startswith("services.")}


def settings_of(service: str) -> Any:
    """The Settings class of a service."""
    return importlib.import_module(f"services.{service}.settings").Settings


def variables_of(service: str) -> set[str]:
    """The variables that a service reads."""
    return {f"RHEOCAST_{name.upper()}" for name in settings_of(service).model_fields}
