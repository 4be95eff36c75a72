"""The images: each has the extras that its services import, nothing that built them, and no root."""

from __future__ import annotations

import ast
import importlib.util
import re
import tomllib
from functools import cache
from pathlib import Path

import pytest

from shared.operated.prepare import FOLDERS
from tests.support.compose import COMPOSE, ROOT, WAYS, module_of, ours, services

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DOCKERFILE = (ROOT / "deploy/docker/Dockerfile").read_text()
STAGES = {
    name: (parent, body)
    for parent, name, body in re.findall(
        r"^FROM (\S+) AS (\S+)\n(.*?)(?=^FROM |\Z)", DOCKERFILE, re.DOTALL | re.MULTILINE
    )
}
IMPORTED_AS = {
    "nats-py": "nats",
    "opentelemetry-api": "opentelemetry",
    "opentelemetry-sdk": "opentelemetry",
    "opentelemetry-exporter-otlp-proto-http": "opentelemetry",
    "prometheus-client": "prometheus_client",
    "pydantic-settings": "pydantic_settings",
    "pyyaml": "yaml",
}


def modules_of(requirements: list[str]) -> set[str]:
    """The modules that a list of requirements brings."""
    names = [re.split(r"[\[<>=!~ ]", requirement)[0] for requirement in requirements]
    return {IMPORTED_AS.get(name, name) for name in names}


@cache
def imports_of(module: str) -> tuple[frozenset[str], frozenset[str]]:
    """What loading a module loads at once: modules of ours, and packages of others. Imports in functions may fail."""
    spec = importlib.util.find_spec(module)
    assert spec is not None, module
    assert spec.origin is not None, module
    own: set[str] = set()
    foreign: set[str] = set()
    nodes: list[ast.stmt] = list(ast.parse(Path(spec.origin).read_text()).body)
    while nodes:
        node = nodes.pop()
        named: list[str] = []
        if isinstance(node, ast.Import):
            named = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            named = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.If) and "TYPE_CHECKING" not in ast.unparse(node.test):
            nodes += [*node.body, *node.orelse]
        for name in named:
            if name.split(".")[0] not in ("shared", "services"):
                foreign.add(name.split(".")[0])
            elif is_module(name):
                own.add(name)
    parts = module.split(".")
    own |= {".".join(parts[:count]) for count in range(1, len(parts))}
    return frozenset(own), frozenset(foreign)


@cache
def is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def needed_by(module: str) -> set[str]:
    """Packages of others without which ``python -m module`` does not start."""
    seen: set[str] = set()
    waiting, foreign = [f"{module}.__main__"], set[str]()
    while waiting:
        each = waiting.pop()
        if each not in seen:
            seen.add(each)
            own, others = imports_of(each)
            waiting += own
            foreign |= others
    return foreign


def built(target: str) -> str:
    """The text of the stage whose environment an image holds, and of the stages that it begins with."""
    copied = re.search(r"COPY --from=(\S+) /opt/venv /opt/venv", STAGES[target][1])
    assert copied is not None
    stage, text = copied.group(1), ""
    while stage in STAGES:
        stage, body = STAGES[stage]
        text += body
    return text


def extras_of(target: str) -> set[str]:
    found = re.search(r'"\.\[([a-z,]+)\]"', built(target))
    assert found is not None
    return set(found.group(1).split(","))


USED = {
    (module_of(service), service["build"]["target"])
    for paths in WAYS.values()
    for service in ours(services(*paths)).values()
    if "build" in service
}


@pytest.mark.parametrize(("module", "target"), sorted(USED))
def test_an_image_has_what_its_service_imports(module: str, target: str) -> None:
    extras = extras_of(target)
    assert extras <= set(PROJECT["optional-dependencies"])
    installed = modules_of(PROJECT["dependencies"])
    for extra in extras:
        installed |= modules_of(PROJECT["optional-dependencies"][extra])
    every = set(installed)
    for requirements in PROJECT["optional-dependencies"].values():
        every |= modules_of(requirements)
    assert needed_by(module) & every <= installed


def test_only_workers_carry_torch() -> None:
    assert all("torch" not in needed_by(module) for module, target in USED if target in ("light", "media"))
    assert {module for module, target in USED if "worker" in extras_of(target)} == {"services.worker"}


def test_every_target_that_compose_builds_is_there_and_none_is_in_vain() -> None:
    built_by_compose = {target for _, target in USED}
    assert built_by_compose == {name for name, (parent, _) in STAGES.items() if parent == "base"}


@pytest.mark.parametrize("target", sorted({target for _, target in USED}))
def test_images_run_as_nobody_in_particular_and_hold_no_builder(target: str) -> None:
    parent, body = STAGES[target]
    assert parent == "base"
    assert body.rstrip().splitlines()[-1].startswith("USER rheocast")
    assert "pip install" not in body
    assert "pip install --no-deps ." in built(target)


def test_the_user_is_the_one_compose_names() -> None:
    uid = re.search(r"useradd .*--uid (\d+) rheocast", STAGES["base"][1])
    assert uid is not None
    assert {service["user"] for service in ours(services(COMPOSE)).values()} == {f"{uid.group(1)}:{uid.group(1)}"}


def test_folders_that_volumes_are_mounted_on_belong_to_that_user() -> None:
    made = re.search(r"mkdir -p (.*?) \\?\n", STAGES["base"][1])
    assert made is not None
    folders = set(made.group(1).split())
    each = re.search(r"for user in ([a-z ]+);", STAGES["base"][1])
    assert each is not None
    assert set(each.group(1).split()) == set(FOLDERS)
    folders |= {f"/prepared/{folder}" for folder in FOLDERS}
    for target, source in mounted():
        assert target in folders or source.startswith("secrets"), source


def mounted() -> set[tuple[str, str]]:
    """Where which volume is mounted in an image of ours."""
    found: set[tuple[str, str]] = set()
    for paths in WAYS.values():
        for service in services(*paths).values():
            for volume in service.get("volumes", ()):
                source, target = volume.split(":")[:2]
                if source[0] not in "./" and service["image"].startswith("rheocast/"):
                    found.add((target, source))
    return found


def test_no_volume_gets_what_an_image_has_elsewhere() -> None:
    """A new volume is filled from the image of whoever is made first: a service, before ``setup`` has made its secrets."""
    assert "/secrets" not in re.findall(r"[\w/]+", STAGES["base"][1].split("RUN", 1)[1])
    secrets = {(target, source) for target, source in mounted() if source.startswith("secrets-")}
    assert {target for target, _ in secrets if not target.startswith("/prepared/")} == {"/secrets"}
    assert {source.removeprefix("secrets-") for target, source in secrets if target != "/secrets"} == set(FOLDERS)


def test_what_the_build_copies_exists_and_is_not_ignored() -> None:
    ignored = (ROOT / ".dockerignore").read_text().split()
    for line in re.findall(r"^COPY (?!--from)(.*)$", DOCKERFILE, re.MULTILINE):
        for source in line.split()[:-1]:
            assert (ROOT / source).exists(), source
            assert source not in ignored
