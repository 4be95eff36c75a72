"""The packages that run are the ones in this repository, and the folders are what the architecture says."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path

import pytest

import services
import shared

ROOT = Path(__file__).resolve().parents[2]
SERVICES = ("gateway", "ingest", "motion", "scheduler", "worker", "egress")


def test_shared_and_services_are_ours() -> None:
    assert Path(str(shared.__file__)).parent == ROOT / "shared"
    assert Path(str(services.__file__)).parent == ROOT / "services"


@pytest.mark.parametrize("name", SERVICES)
def test_every_service_has_the_same_inside(name: str) -> None:
    for module in ("__main__", "settings", "app", "handlers", "core"):
        assert importlib.util.find_spec(f"services.{name}.{module}") is not None, module
    doc = importlib.import_module(f"services.{name}").__doc__ or ""
    for word in ("In:", "Out:", "Failure policy"):
        assert word in doc, f"services.{name} must say its {word}"


@pytest.mark.parametrize("name", SERVICES)
def test_only_settings_read_the_environment(name: str) -> None:
    for path in (ROOT / "services" / name).rglob("*.py"):
        if path.name != "settings.py":
            assert "os.environ" not in path.read_text(), path


def test_files_are_short_enough_to_read() -> None:
    long = [
        (path.relative_to(ROOT).as_posix(), lines)
        for folder in ("services", "shared", "bench", "training")
        for path in (ROOT / folder).rglob("*.py")
        if (lines := len(path.read_text().splitlines())) > 400
    ]
    assert long == []
