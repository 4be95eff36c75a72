"""A worker's seat says its pipeline, stage and roles: what a StatefulSet's ordinal is for."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from services.cli.topology import Topology, processes
from services.worker.settings import Settings


@pytest.mark.parametrize("stages", [1, 2, 4])
def test_seats_make_the_same_pipelines_as_the_command_line(stages: int) -> None:
    topology = Topology(model="rheo-tiny", stages=stages, read_roots=(), write_roots=(), pipelines=2)
    workers = [spec.env for spec in processes(topology) if spec.module == "services.worker"]
    for seat, env in enumerate(workers):
        settings = Settings(seat=seat, stages=stages)
        assert settings.pipeline == env["RHEOCAST_PIPELINE"]
        assert str(settings.stage) == env["RHEOCAST_STAGE"]
        assert {role.value for role in settings.roles} == set(env["RHEOCAST_ROLES"].split(","))


def test_roles_that_are_given_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RHEOCAST_SEAT", "1")
    monkeypatch.setenv("RHEOCAST_ROLES", "stage,decode,text")
    assert [role.value for role in Settings().roles] == ["stage", "decode", "text"]


def test_a_seat_beside_a_stage_is_refused_with_the_fix() -> None:
    with pytest.raises(ValidationError, match="leave stage out"):
        Settings(seat=1, stage=1)
