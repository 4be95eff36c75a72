"""What every container of compose.yaml and its overlays is held to."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.compose import COMPOSE, OVERLAYS, WAYS, filled, module_of, ours, services

FILES = {way: services(*paths) for way, paths in WAYS.items()}
EACH = [pytest.param(service, id=f"{file}-{name}") for file, found in FILES.items() for name, service in found.items()]
NO_SHELL = "otel/"
"""The collector's image holds its binary alone: nothing in it could ask for its health."""


def once(service: dict[str, Any]) -> bool:
    """Whether it does one thing and ends."""
    return module_of(service) == "shared.operated"


@pytest.mark.parametrize("service", EACH)
def test_nobody_has_more_rights_than_needed(service: dict[str, Any]) -> None:
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service.get("cap_add", []) in ([], ["NET_BIND_SERVICE"])
    assert "privileged" not in service
    assert service.get("pid") != "host"
    assert service.get("network_mode") != "host"
    if not service["image"].startswith("prom/"):  # whose image says "nobody"
        user = service["user"].split(":")[0]
        assert int(user) > 0


@pytest.mark.parametrize("service", EACH)
def test_roots_are_read_only_and_what_is_written_is_named(service: dict[str, Any]) -> None:
    assert service["read_only"] is True
    assert all(":" in volume for volume in service.get("volumes", ()))
    for volume in service.get("volumes", ()):
        if volume.startswith("./deploy"):
            assert volume.endswith(":ro"), "configuration is never written"


@pytest.mark.parametrize("service", EACH)
def test_everybody_has_limits_and_is_started_again(service: dict[str, Any]) -> None:
    limits = service["deploy"]["resources"]["limits"]
    assert float(limits["cpus"]) > 0
    assert limits["memory"][-1] in "mg"
    assert service["restart"] == ("on-failure" if once(service) else "unless-stopped")
    assert service["logging"]["options"]["max-size"]
    if not service["image"].startswith(NO_SHELL) and not once(service):
        assert service["healthcheck"]["test"][0] == "CMD", "no shell is needed to ask"


def test_our_services_are_reaped_bounded_and_drained() -> None:
    for found in FILES.values():
        for name, service in ours(found).items():
            assert service["init"] is True, name
            assert service["pids_limit"] <= 512
            assert service["stop_grace_period"] == "20s", "longer than RHEOCAST_DRAIN_S"
            assert all("mode=1777" in each and "size=" in each for each in service["tmpfs"])
            for needed in {"nats", "redis"} & found.keys():
                assert service["depends_on"][needed]["condition"] == "service_healthy"


@pytest.mark.parametrize("file", [COMPOSE, *OVERLAYS], ids=lambda path: path.stem)
def test_named_volumes_are_declared_and_used(file: Any) -> None:
    content = filled(file)
    used = {
        volume.split(":")[0]
        for service in content["services"].values()
        for volume in service.get("volumes", ())
        if volume[0] not in "./"
    }
    declared = set(content.get("volumes") or {})
    base = set(filled(COMPOSE)["volumes"])
    assert used <= declared | base
    assert declared <= used | base


def test_a_tmpfs_that_runs_code_is_the_compilers_alone() -> None:
    for found in FILES.values():
        for name, service in found.items():
            if any("exec" in each.split(":", 1)[1] for each in service.get("tmpfs", ())):
                assert name.startswith("gpu-")
