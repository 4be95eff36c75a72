"""docker-compose itself reads compose.yaml with every profile and overlay."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.support.compose import COMPOSE, ROOT, WAYS, services, variables

TOOL = shutil.which("docker-compose")
pytestmark = pytest.mark.skipif(
    TOOL is None, reason="no docker-compose: apt-get install docker-compose, or: make tools"
)

PROFILES = sorted({profile for service in services(COMPOSE).values() for profile in service.get("profiles", ())})
SETS = [
    pytest.param((COMPOSE,), [], id="plain"),
    *(pytest.param((COMPOSE,), [profile], id=profile) for profile in PROFILES),
    *(pytest.param(paths, PROFILES, id=f"{way}-all") for way, paths in WAYS.items()),
]


def config(paths: tuple[Path, ...], profiles: list[str]) -> dict[str, dict[str, object]]:
    needed = {
        name: "./s" if name == "SECRETS" else "127.0.0.2"
        for path in paths
        for name, default in variables(path).items()
        if default is None
    }
    arguments = itertools.chain.from_iterable(
        [("-f", str(path)) for path in paths]
        + [("--project-directory", str(ROOT))]
        + [("--profile", profile) for profile in profiles]
    )
    done = subprocess.run(
        [str(TOOL), *arguments, "config"],
        cwd=ROOT,
        env={**os.environ, **needed, "COMPOSE_PROFILES": ""},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert "not set" not in done.stderr, done.stderr
    found: dict[str, dict[str, object]] = yaml.safe_load(done.stdout)["services"]
    return found


@pytest.mark.parametrize(("paths", "profiles"), SETS)
def test_it_accepts_them_and_reads_what_the_tests_read(paths: tuple[Path, ...], profiles: list[str]) -> None:
    found, wanted = config(paths, profiles), services(*paths)
    assert set(found) == set(wanted)
    for name, service in wanted.items():
        assert found[name].get("profiles", []) == service.get("profiles", [])
        assert set(found[name].get("environment", {})) == set(service.get("environment", {})), name
