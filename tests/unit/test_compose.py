"""compose.yaml and its overlays are not run here, so they are read: every command, variable, port and folder must be real."""

from __future__ import annotations

import importlib.util
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from shared.operated.prepare import FOLDERS
from shared.rtc.places import RtcSettings
from tests.support.compose import (
    COMPOSE,
    NAMES,
    NOT_OURS,
    ROOT,
    WAYS,
    module_of,
    ours,
    services,
    settings_of,
    variables,
    variables_of,
)

BASE = services(COMPOSE)
FILES = {way: services(*paths) for way, paths in WAYS.items()}
EVERY = sorted({path for paths in WAYS.values() for path in paths})
EACH = [pytest.param(found[name], id=f"{file}-{name}") for file, found in FILES.items() for name in ours(found)]


def environment(service: dict[str, Any]) -> dict[str, str]:
    return {name: "" if value is None else str(value) for name, value in service["environment"].items()}


def test_the_six_services_run_without_any_profile() -> None:
    plain = {name for name, service in ours(BASE).items() if "profiles" not in service}
    assert plain == set(NAMES)
    assert {profile for service in BASE.values() for profile in service.get("profiles", ())} >= {"gpu", "observe"}


@pytest.mark.parametrize("service", EACH)
def test_the_command_is_a_real_module(service: dict[str, Any]) -> None:
    module = module_of(service)
    assert importlib.util.find_spec(f"{module}.__main__") is not None
    assert module.removeprefix("services.") in NAMES


@pytest.mark.parametrize("service", EACH)
def test_every_variable_is_one_that_the_service_reads(service: dict[str, Any]) -> None:
    given = set(environment(service)) - NOT_OURS
    known = variables_of(module_of(service).removeprefix("services."))
    assert given <= known, f"unknown: {given - known}"


@pytest.mark.parametrize("service", EACH)
def test_the_values_are_ones_that_the_service_accepts(service: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, value in environment(service).items():
        monkeypatch.setenv(variable, value)
    settings = settings_of(module_of(service).removeprefix("services."))()
    assert settings.instance == environment(service)["RHEOCAST_INSTANCE"]
    assert settings.nats_url.endswith(":4222")


@pytest.mark.parametrize("service", EACH)
def test_health_is_asked_on_the_port_the_service_listens_on(service: dict[str, Any]) -> None:
    port = environment(service)["RHEOCAST_HEALTH_PORT"]
    assert f"127.0.0.1:{port}/readyz" in service["healthcheck"]["test"][-1]


@pytest.mark.parametrize("found", FILES.values(), ids=FILES)
def test_services_of_a_host_share_one_memory_and_one_run_id(found: dict[str, Any]) -> None:
    assert found["memory"]["ipc"] == "shareable"
    assert found["memory"]["shm_size"]
    for name, service in ours(found).items():
        assert service["ipc"] == "service:memory", name
        assert environment(service)["RHEOCAST_SHM_DIR"] == "/dev/shm"
    assert len({environment(service)["RHEOCAST_RUN_ID"] for service in ours(found).values()}) == 1


@pytest.mark.parametrize("found", FILES.values(), ids=FILES)
def test_no_two_instances_have_one_name_and_no_two_workers_one_seat(found: dict[str, Any]) -> None:
    names = Counter(environment(service)["RHEOCAST_INSTANCE"] for service in ours(found).values())
    assert max(names.values()) == 1, names
    places = Counter(
        (settings.pipeline, settings.stage)
        for service in ours(found).values()
        if module_of(service) == "services.worker"
        for settings in [worker_settings(service)]
    )
    assert max(places.values()) == 1, places


def worker_settings(service: dict[str, Any]) -> Any:
    plain = {name.removeprefix("RHEOCAST_").lower(): value for name, value in environment(service).items()}
    return settings_of("worker")(
        **{name: value for name, value in plain.items() if name in settings_of("worker").model_fields}
    )


@pytest.mark.parametrize(("overlay", "count"), [("two-gpus", 2), ("four-gpus", 4)])
def test_a_gpu_overlay_has_a_worker_for_each_gpu_that_is_like_the_first(overlay: str, count: int) -> None:
    found = FILES[overlay]
    workers = [found[f"gpu-{number}"] for number in range(count)]
    settings = [worker_settings(worker) for worker in workers]
    assert [each.seat for each in settings] == list(range(count))
    assert [each.device for each in settings] == [f"cuda:{number}" for number in range(count)]
    assert {each.stages for each in settings} == {count}, "one model over all of them, unless STAGES says otherwise"
    own = {"environment", "volumes", "build", "depends_on"}
    plain = [{key: value for key, value in worker.items() if key not in own} for worker in workers]
    assert all(each == plain[0] for each in plain)
    differs = {"RHEOCAST_INSTANCE", "RHEOCAST_SEAT", "RHEOCAST_DEVICE"}
    common = [{k: v for k, v in environment(worker).items() if k not in differs} for worker in workers]
    assert all(each == common[0] for each in common)


def published(service: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Address, port on the host, port within; each as written."""
    found = [re.fullmatch(r"([\d.]+):([\d-]+):([\d-]+)(?:/udp)?", port) for port in service.get("ports", ())]
    return [match.groups() for match in found if match is not None]  # type: ignore[misc]


def test_ports_are_published_on_loopback_only() -> None:
    for name, service in BASE.items():
        assert len(published(service)) == len(service.get("ports", ())), name
        assert {address for address, _, _ in published(service)} <= {"127.0.0.1"}, name


@pytest.mark.parametrize("way", ["tls", "tls-two-gpus", "tls-four-gpus", "front"])
def test_with_tls_nobody_speaks_to_nats_or_redis_in_clear(way: str) -> None:
    for name, service in ours(FILES[way]).items():
        given = environment(service)
        assert given["RHEOCAST_NATS_URL"].startswith("tls://"), name
        assert given["RHEOCAST_REDIS_URL"].startswith("rediss://"), name
        assert given["RHEOCAST_TLS_CA"] == f"/run/secrets/{service['secrets'][0]}", name
    for server, conf in (("nats", "nats"), ("redis", "redis")):
        path = ROOT / f"deploy/{conf}/tls.conf"
        named = set(re.findall(r"/run/secrets/(\w+)", path.read_text()))
        assert named <= set(FILES[way][server]["secrets"])


def test_the_second_host_makes_one_pipeline_with_the_first() -> None:
    first, second = (worker_settings(FILES[way][name]) for way, name in (("front", "gpu-0"), ("back", "gpu-1")))
    assert (first.pipeline, first.stage, first.stages) == ("p0", 0, 2)
    assert (second.pipeline, second.stage, second.stages) == ("p0", 1, 2)


def test_who_publishes_the_api_to_others_asks_for_tokens() -> None:
    gateway = FILES["public"]["gateway"]
    given = environment(gateway)
    assert given["RHEOCAST_ALLOW_NO_AUTH"] == "0"
    assert given["RHEOCAST_TOKENS_FILE"] == f"/run/secrets/{gateway['secrets'][0]}"
    assert variables(ROOT / "deploy/compose/public.yaml")["PUBLIC_ADDRESS"] is None, "nobody publishes it by accident"


def test_published_ports_are_those_the_services_listen_on() -> None:
    assert [inner for _, _, inner in published(BASE["gateway"])] == [
        environment(BASE["gateway"])["RHEOCAST_GATEWAY_PORT"]
    ]
    for name, more in (("ingest", ["RHEOCAST_RTMP_PORTS"]), ("egress", [])):
        wanted = [environment(BASE[name])[variable] for variable in ("RHEOCAST_RTC_PORTS", *more)]
        assert [(outer, inner) for _, outer, inner in published(BASE[name])] == [(each, each) for each in wanted]


def test_a_browser_on_the_host_reaches_webrtc_within_the_containers() -> None:
    """All addresses are bound, the published one is told, and no two services use one port."""
    seen: set[int] = set()
    for name in ("ingest", "egress"):
        given = environment(BASE[name])
        places = RtcSettings(
            rtc_hosts=given["RHEOCAST_RTC_HOSTS"],
            rtc_ports=given["RHEOCAST_RTC_PORTS"],
            rtc_public_ip=given["RHEOCAST_RTC_PUBLIC_IP"],
        ).places
        assert places.hosts == ("every",)
        assert places.public == "127.0.0.1"
        ports = set(range(places.ports[0], places.ports[1] + 1))
        assert not ports & seen
        seen |= ports


def test_files_are_shared_by_who_writes_and_who_serves_them() -> None:
    media = environment(BASE["gateway"])["RHEOCAST_MEDIA_DIR"]
    for name in ("gateway", "egress"):
        assert f"media:{media}" in BASE[name]["volumes"]
    assert f"media:{media}:ro" in BASE["ingest"]["volumes"]
    assert environment(BASE["egress"])["RHEOCAST_FILE_ROOTS"] == media
    for service in ours(BASE).values():
        if any(volume.startswith("models:") for volume in service.get("volumes", ())):
            assert environment(service)["RHEOCAST_MODELS_DIR"] == "/models"


@pytest.mark.parametrize("found", FILES.values(), ids=FILES)
def test_a_service_has_its_own_users_secrets_and_no_others(found: dict[str, Any]) -> None:
    for service in ours(found).values():
        given, user = environment(service), module_of(service).removeprefix("services.")
        assert {given["RHEOCAST_NATS_USER"], given["RHEOCAST_REDIS_USER"]} == {user}
        mounted = [volume for volume in service["volumes"] if "secrets" in volume]
        assert mounted == [f"secrets-{user}:/secrets:ro" if "setup" in found else "secrets:/secrets:ro"]
        for variable, value in given.items():
            if variable.endswith("_FILE") and value.startswith("/secrets/"):
                assert value.removeprefix("/secrets/") in ("nats", "redis", "turn"), variable
    if "setup" in found:
        assert {volume.split(":")[1] for volume in found["setup"]["volumes"] if "secrets" in volume} == {
            f"/prepared/{folder}" for folder in FOLDERS
        }


@pytest.mark.parametrize("found", FILES.values(), ids=FILES)
def test_mounted_files_exist(found: dict[str, Any]) -> None:
    for service in found.values():
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            if source.startswith("./deploy"):
                assert (ROOT / source).exists(), source


def test_the_example_environment_names_every_variable_with_its_default() -> None:
    lines = (ROOT / ".env.example").read_text().splitlines()
    told = dict(line.removeprefix("# ").split("=", 1) for line in lines if re.match(r"(# )?[A-Z0-9_]+=", line))
    read: dict[str, str | None] = {}
    for path in EVERY:
        for name, default in variables(path).items():
            read.setdefault(name, default)
    own = {"COMPOSE_FILE", "COMPOSE_PROFILES", "COMPOSE_PROJECT_NAME"}
    assert set(told) - own == set(read)
    for name, default in read.items():
        assert told[name] == (default or ""), name


def test_paths_named_in_comments_exist() -> None:
    for path in (ROOT / ".env.example", *EVERY):
        comments = "\n".join(re.findall(r"#(.*)$", path.read_text(), re.MULTILINE))
        for named in re.findall(r"\b(?:docs|deploy)/[\w./-]+\.(?:md|yaml|conf)", comments):
            assert Path(ROOT / named).is_file(), f"{path.name}: {named}"
