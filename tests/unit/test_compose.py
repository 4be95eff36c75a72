"""compose.yaml is not run here, so it is read: every command, variable, port and folder must be real."""

from __future__ import annotations

import importlib
import importlib.util
import re
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text())
OURS = {name: service for name, service in COMPOSE["services"].items() if "build" in service}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DOCKERFILE = (ROOT / "deploy/docker/Dockerfile").read_text()
NOT_OURS = {"OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}


def settings_of(service: str) -> set[str]:
    fields = importlib.import_module(f"services.{service}.settings").Settings.model_fields
    return {f"RHEOCAST_{name.upper()}" for name in fields}


def test_the_six_services_are_there_and_nothing_else_is_built() -> None:
    assert set(OURS) == {"gateway", "ingest", "motion", "scheduler", "worker", "egress"}


@pytest.mark.parametrize("name", sorted(OURS))
def test_the_command_is_a_real_module(name: str) -> None:
    command = OURS[name]["command"]
    assert command[:2] == ["python", "-m"]
    assert importlib.util.find_spec(f"{command[2]}.__main__") is not None
    assert command[2] == f"services.{name}"


@pytest.mark.parametrize("name", sorted(OURS))
def test_every_variable_is_one_that_the_service_reads(name: str) -> None:
    given = set(OURS[name]["environment"]) - NOT_OURS
    assert given <= settings_of(name), f"unknown: {given - settings_of(name)}"


@pytest.mark.parametrize("name", sorted(OURS))
def test_the_values_are_ones_that_the_service_accepts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, value in OURS[name]["environment"].items():
        monkeypatch.setenv(variable, str(value))
    settings = importlib.import_module(f"services.{name}.settings").Settings()
    assert settings.instance == OURS[name]["environment"]["RHEOCAST_INSTANCE"]
    assert settings.nats_url == "nats://nats:4222"


@pytest.mark.parametrize("name", sorted(OURS))
def test_health_is_asked_on_the_port_the_service_listens_on(name: str) -> None:
    port = OURS[name]["environment"]["RHEOCAST_HEALTH_PORT"]
    assert f"127.0.0.1:{port}/readyz" in OURS[name]["healthcheck"]["test"][-1]


def test_services_that_exchange_tensors_share_the_workers_memory_and_run_id() -> None:
    for name in ("scheduler", "motion", "ingest", "egress"):
        assert OURS[name]["ipc"] == "service:worker"
    assert OURS["worker"]["ipc"] == "shareable"
    assert len({service["environment"]["RHEOCAST_RUN_ID"] for service in OURS.values()}) == 1


def test_the_api_is_published_on_loopback_only_at_the_gateways_port() -> None:
    port = OURS["gateway"]["environment"]["RHEOCAST_GATEWAY_PORT"]
    assert OURS["gateway"]["ports"] == [f"127.0.0.1:{port}:{port}"]
    assert all("ports" not in service for name, service in COMPOSE["services"].items() if name != "gateway")


@pytest.mark.parametrize("name", sorted(OURS))
def test_the_image_installs_the_extras_that_the_service_imports(name: str) -> None:
    media = {"media", "webrtc"}
    needs = {"ingest": media, "egress": media, "worker": {"worker"}}
    target = OURS[name]["build"]["target"]
    stage = re.search(rf"FROM base AS {target}\n(.*?)(?=\nFROM|\Z)", DOCKERFILE, re.DOTALL)
    assert stage is not None
    extras = set(re.findall(r"\[([a-z,]+)\]", stage.group(1))[0].split(","))
    assert extras <= set(PROJECT["optional-dependencies"])
    assert needs.get(name, {"gateway"}) <= extras


def test_the_gateway_has_the_folder_of_uploads_recordings_and_hls() -> None:
    media = OURS["gateway"]["environment"]["RHEOCAST_MEDIA_DIR"]
    for name in ("gateway", "egress"):
        assert f"./media:{media}" in OURS[name]["volumes"]
    assert OURS["egress"]["environment"]["RHEOCAST_FILE_ROOTS"] == media


def test_mounted_files_exist() -> None:
    for service in COMPOSE["services"].values():
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            if source.startswith("./deploy"):
                assert (ROOT / source).is_file(), source
