"""The manifests of deploy/kubernetes, read: what they name exists, here or among themselves."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from services.cli.commands import cli
from shared.config import ServiceSettings
from shared.operated.bus_users import SERVICES
from tests.support.compose import NOT_OURS, ROOT, settings_of, variables_of

FOLDER = ROOT / "deploy/kubernetes"
BASE = FOLDER / "base"
OVERLAYS = sorted((FOLDER / "overlays").iterdir())
DOCUMENTS: list[dict[str, Any]] = [
    document for path in sorted(BASE.glob("*.yaml")) for document in yaml.safe_load_all(path.read_text())
]
WORKLOADS = {each["metadata"]["name"]: each for each in DOCUMENTS if each["kind"] in ("Deployment", "StatefulSet")}
COMMON: dict[str, str] = next(each for each in DOCUMENTS if each["kind"] == "ConfigMap")["data"]
FIELDS = {
    "metadata.name": "gpu-3",
    "metadata.labels['apps.kubernetes.io/pod-index']": "3",
    "status.hostIP": "192.0.2.1",
}
OF_THE_COMMAND_LINE = {"RHEOCAST_TOKEN"}


def container(name: str) -> dict[str, Any]:
    containers = WORKLOADS[name]["spec"]["template"]["spec"]["containers"]
    assert len(containers) == 1
    return containers[0]


def environment(name: str) -> dict[str, str]:
    own: dict[str, str] = {}
    for each in container(name)["env"]:
        path = each.get("valueFrom", {}).get("fieldRef", {}).get("fieldPath")
        own[each["name"]] = FIELDS[path] if path else each.get("value", "secret")
    return {**COMMON, **own}


def labels(name: str) -> dict[str, str]:
    return WORKLOADS[name]["spec"]["template"]["metadata"]["labels"]


def service_of(name: str) -> str:
    return container(name)["command"][2].removeprefix("services.")


def test_every_service_is_there() -> None:
    assert {service_of(name) for name in WORKLOADS} == set(SERVICES)


@pytest.mark.parametrize("name", WORKLOADS)
def test_the_command_is_a_real_module_in_its_own_image(name: str) -> None:
    command, image = container(name)["command"], container(name)["image"]
    assert command[:2] == ["python", "-m"]
    assert importlib.util.find_spec(f"{command[2]}.__main__") is not None
    target = image.removeprefix("rheocast/")
    wanted = {"worker": "gpu", "ingest": "media", "egress": "media"}.get(service_of(name), "light")
    assert target == wanted
    assert f"AS {target}\n" in (ROOT / "deploy/docker/Dockerfile").read_text()


@pytest.mark.parametrize("name", WORKLOADS)
def test_every_variable_is_read_and_every_value_accepted(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given, service = environment(name), service_of(name)
    unknown = set(given) - NOT_OURS - OF_THE_COMMAND_LINE - variables_of(service)
    assert not unknown
    for variable, value in given.items():
        monkeypatch.setenv(variable, value)
    settings = settings_of(service)()
    assert (settings.nats_user, settings.redis_user) == (service, service)
    if service == "worker":
        assert (settings.pipeline, settings.stage) == ("p3", 0), "the ordinal is the seat"


def test_what_is_common_is_for_everybody() -> None:
    everybody = {f"RHEOCAST_{field.upper()}" for field in ServiceSettings.model_fields} | NOT_OURS
    assert set(COMMON) <= everybody


@pytest.mark.parametrize("name", WORKLOADS)
def test_probes_ask_where_the_service_answers(name: str) -> None:
    each = container(name)
    ports = {port["name"]: port["containerPort"] for port in each["ports"]}
    assert str(ports["health"]) == environment(name)["RHEOCAST_HEALTH_PORT"]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert each[probe]["httpGet"]["port"] == "health"
        assert each[probe]["httpGet"]["path"] in ("/readyz", "/healthz")
    assert each["livenessProbe"]["httpGet"]["path"] == "/healthz", "who is not ready is not killed for it"
    scraped = WORKLOADS[name]["spec"]["template"]["metadata"]["annotations"]
    assert scraped["prometheus.io/port"] == str(ports["health"])
    if name == "gateway":
        assert str(ports["http"]) == environment(name)["RHEOCAST_GATEWAY_PORT"]


@pytest.mark.parametrize("name", WORKLOADS)
def test_nobody_has_more_rights_than_needed(name: str) -> None:
    pod, each = WORKLOADS[name]["spec"]["template"]["spec"], container(name)
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["automountServiceAccountToken"] is False
    context = each["securityContext"]
    assert context["readOnlyRootFilesystem"] is True
    assert context["allowPrivilegeEscalation"] is False
    assert context["capabilities"] == {"drop": ["ALL"]}
    assert {"cpu", "memory"} <= set(each["resources"]["limits"])


@pytest.mark.parametrize("name", WORKLOADS)
def test_volumes_are_there_and_secrets_its_own(name: str) -> None:
    spec = WORKLOADS[name]["spec"]
    pod = spec["template"]["spec"]
    claimed = {each["metadata"]["name"] for each in spec.get("volumeClaimTemplates", ())}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    mounted = {mount["name"] for mount in container(name)["volumeMounts"]}
    assert mounted == set(volumes) | claimed
    assert volumes["secrets"]["secret"]["secretName"] == f"rheocast-{service_of(name)}"
    claims = {each["metadata"]["name"] for each in DOCUMENTS if each["kind"] == "PersistentVolumeClaim"}
    for volume in volumes.values():
        if "persistentVolumeClaim" in volume:
            assert volume["persistentVolumeClaim"]["claimName"] in claims
    assert container(name)["envFrom"] == [{"configMapRef": {"name": "rheocast"}}]


def test_selectors_find_their_pods() -> None:
    for document in DOCUMENTS:
        spec = document.get("spec", {})
        if document["kind"] in ("Deployment", "StatefulSet", "PodDisruptionBudget"):
            wanted = spec["selector"]["matchLabels"]
        elif document["kind"] == "Service":
            wanted = spec["selector"]
        else:
            continue
        assert any(wanted.items() <= labels(name).items() for name in WORKLOADS), document["metadata"]


def test_a_worker_is_drained_before_it_is_stopped_in_the_time_it_has() -> None:
    script = container("gpu")["lifecycle"]["preStop"]["exec"]["command"][-1]
    budget = WORKLOADS["gpu"]["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    spent = 0
    for command in re.split(r"\|\||&&", script):
        words = shlex.split(command)
        if words[0] == "timeout":
            spent += int(words[1])
            assert words[2:4] == ["rheocast", "drain"]
            known = {option for param in cli.commands["drain"].params for option in param.opts}
            assert {word for word in words if word.startswith("--")} <= known
            api = words[words.index("--api") + 1]
            gateway = next(d for d in DOCUMENTS if d["kind"] == "Service" and d["metadata"]["name"] == "gateway")
            assert api == f"http://{gateway['metadata']['name']}:{gateway['spec']['ports'][0]['port']}"
    assert 0 < spent + float(COMMON["RHEOCAST_DRAIN_S"]) < budget
    assert "$RHEOCAST_INSTANCE" in script
    assert any(d["kind"] == "PodDisruptionBudget" and d["metadata"]["name"] == "gpu" for d in DOCUMENTS)


def test_scaling_goes_by_a_metric_that_workers_export() -> None:
    scaled = yaml.safe_load((FOLDER / "overlays/keda/scaling.yaml").read_text())
    target = scaled["spec"]["scaleTargetRef"]
    assert WORKLOADS[target["name"]]["kind"] == target["kind"]
    (trigger,) = scaled["spec"]["triggers"]
    named = set(re.findall(r"rheocast_\w+", trigger["metadata"]["query"]))
    documented = set(re.findall(r"^\| `(rheocast_\w+)`", (ROOT / "docs/metrics.md").read_text(), re.MULTILINE))
    assert named
    assert named <= documented
    assert 0 < float(trigger["metadata"]["threshold"]) < settings_of("scheduler")().target_load
    pods = re.search(r'pod=~"([^"]+)"', trigger["metadata"]["query"])
    assert pods is not None
    assert re.fullmatch(pods.group(1), f"{target['name']}-0")


@pytest.mark.parametrize("folder", [BASE, *OVERLAYS], ids=lambda path: path.name)
def test_a_kustomization_lists_what_lies_beside_it(folder: Path) -> None:
    found = yaml.safe_load((folder / "kustomization.yaml").read_text())
    named = [*found.get("resources", ()), *(patch["path"] for patch in found.get("patches", ()))]
    for each in named:
        assert (folder / each).exists()
    assert {path.name for path in folder.glob("*.yaml")} - {"kustomization.yaml"} == set(named) - {"../../base"}


@pytest.mark.parametrize(
    "path", sorted((FOLDER / "overlays/host-network").glob("[!k]*.yaml")), ids=lambda path: path.stem
)
def test_patches_are_of_something_and_name_real_variables(path: Path) -> None:
    patch = yaml.safe_load(path.read_text())
    name = patch["metadata"]["name"]
    assert WORKLOADS[name]["kind"] == patch["kind"]
    (changed,) = patch["spec"]["template"]["spec"]["containers"]
    assert changed["name"] == container(name)["name"]
    given = {each["name"]: each.get("value") for each in changed["env"]}
    assert set(given) <= variables_of(service_of(name))
    (port,) = [each["containerPort"] for each in changed["ports"] if "name" in each]
    assert given["RHEOCAST_HEALTH_PORT"] == str(port)
    scraped = patch["spec"]["template"]["metadata"]["annotations"]
    assert scraped["prometheus.io/port"] == str(port)


def test_the_servers_charts_are_given_what_compose_gives_them() -> None:
    nats = yaml.safe_load((FOLDER / "nats-values.yaml").read_text())["config"]
    shipped = (ROOT / "deploy/nats/nats.conf").read_text()
    for key in ("max_payload", "max_pending", "write_deadline"):
        assert f"{key}: {nats['merge'][key].strip('<> ')}\n" in shipped
    redis = yaml.safe_load((FOLDER / "redis-values.yaml").read_text())["commonConfiguration"].splitlines()
    own = (ROOT / "deploy/redis/redis.conf").read_text().splitlines()
    assert {line for line in redis if not line.startswith("aclfile")} <= set(own)
