"""Scenarios: data files that ship with the package, or a user's own in TOML or JSON."""

from __future__ import annotations

import json
import tomllib
from enum import StrEnum
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from services.scheduler.admission import Rules
from services.scheduler.quotas import TenantLimits
from shared.engine.plan.devices import DeviceError, device_profile
from shared.engine.plan.registry import model_spec
from shared.engine.plan.spec import SpecError

SHIPPED = Path(__file__).with_name("scenarios")


class ScenarioError(ValueError):
    """A scenario that cannot be run; one line that names the field and the fix."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FleetPart(_Part):
    """The workers: ``pipelines`` of ``stages`` workers each. ``noise`` is the spread of their times (σ of a log-normal)."""

    device: str = "h100"
    model: str = "wan2.1-1.3b"
    width: int = Field(default=832, ge=16, le=2048)
    height: int = Field(default=480, ge=16, le=2048)
    pipelines: int = Field(default=1, ge=1, le=4096)
    stages: int = Field(default=1, ge=1, le=64)
    max_batch: int = Field(default=8, ge=1, le=64)
    noise: float = Field(default=0.03, ge=0, le=1)
    outlier_share: float = Field(default=0.002, ge=0, le=1)
    outlier_factor: float = Field(default=2.5, ge=1, le=100)
    block_pause_ms: float = Field(default=30.0, ge=0)  # a pipeline stands still for each block that moves


class StreamsPart(_Part):
    """The sessions. ``load`` is of what the fleet can do in the steady state; ``count`` of sessions is given instead of it.

    ``lifetime_s`` is the mean of an exponential (0: all of the run). ``poisson``: they come at random and are gone when
    their life is over; else whoever leaves is replaced at once, so that the load stays. All but Poisson's first ones come
    within ``ramp_s``. All are of one ``tenant``.
    """

    tenant: str = Field(default="default", min_length=1)
    fps: float = Field(default=10.0, gt=0, le=240)
    steps: int = Field(default=2, ge=1, le=4)
    deadline_ms: int = Field(default=800, ge=50, le=60_000)
    load: float = Field(default=0.0, ge=0, le=20)
    count: int = Field(default=0, ge=0, le=1_000_000)
    lifetime_s: float = Field(default=0.0, ge=0)
    poisson: bool = False
    ramp_s: float = Field(default=4.0, ge=0)
    open_ms: float = Field(default=200.0, ge=0)  # from the request to the source's first frame
    min_steps: int = Field(default=1, ge=1, le=4)
    min_fps: float | None = Field(default=None, gt=0, le=240)

    @property
    def least_fps(self) -> float:
        """The lowest rate a stream may be given: as commands have it, half of what it asks for, and 4 at least."""
        return self.min_fps if self.min_fps is not None else min(self.fps, max(4.0, self.fps / 2))

    @model_validator(mode="after")
    def _how_many(self) -> Self:
        if (self.load > 0) == (self.count > 0):
            raise ValueError("give either load or count, above 0")
        if self.min_steps > self.steps:
            raise ValueError(f"min_steps {self.min_steps} is above steps {self.steps}: give at most {self.steps}")
        if self.min_fps is not None and self.min_fps > self.fps:
            raise ValueError(f"min_fps {self.min_fps:g} is above fps {self.fps:g}: give at most {self.fps:g}")
        if self.poisson and not self.lifetime_s:
            raise ValueError("poisson arrivals need a lifetime_s")
        return self


class Burst(_Part):
    """From ``at_s`` on and for ``seconds``, ``factor`` times as many sessions; the additional ones leave at its end."""

    at_s: float = Field(ge=0)
    seconds: float = Field(gt=0)
    factor: float = Field(gt=1, le=20)


class Flood(_Part):
    """From ``at_s`` on ``tenant`` asks for ``requests`` sessions, all within ``seconds``; those let in stay for good."""

    tenant: str = Field(min_length=1)
    at_s: float = Field(ge=0)
    requests: int = Field(default=100, ge=1, le=100_000)
    seconds: float = Field(default=2.0, gt=0)


class FaultKind(StrEnum):
    """What happens to a worker."""

    STRAGGLER = "straggler"  # everything takes ``factor`` times as long, for ``seconds`` (0: for good)
    STALL = "stall"  # it is stopped for ``seconds``
    LOSS = "loss"  # it dies, and is back, empty, after ``seconds`` (0: never)


class Fault(_Part):
    """Something happens to the worker of ``stage`` of the pipeline number ``pipeline``."""

    kind: FaultKind
    at_s: float = Field(ge=0)
    pipeline: int = Field(default=0, ge=0)
    stage: int = Field(default=0, ge=0)
    factor: float = Field(default=2.0, ge=1, le=1000)
    seconds: float = Field(default=0.0, ge=0)


class AdmissionPart(_Part):
    """Admission's rules; ``enabled`` false lets everybody in, so that the ladder alone must cope."""

    enabled: bool = True
    target: float = Field(default=Rules().target, gt=0, le=2)
    max_streams: int = Field(default=256, ge=1)


class Scenario(_Part):
    """One simulation but for its policy."""

    title: str = ""
    seed: int = Field(default=1, ge=0)
    seconds: float = Field(default=60.0, gt=0, le=86_400)
    fleet: FleetPart = Field(default_factory=FleetPart)
    streams: StreamsPart
    admission: AdmissionPart = Field(default_factory=AdmissionPart)
    ladder: bool = True  # streams give up quality under load
    bursts: tuple[Burst, ...] = ()
    floods: tuple[Flood, ...] = ()
    tenants: dict[str, TenantLimits] = Field(default_factory=dict)  # whoever is not named may have whatever there is
    faults: tuple[Fault, ...] = ()

    @model_validator(mode="after")
    def _known(self) -> Self:
        fleet = self.fleet
        try:
            spec = model_spec(fleet.model)
            device_profile(fleet.device).times(spec, fleet.width, fleet.height)
        except (DeviceError, SpecError) as error:
            raise ValueError(str(error)) from None
        if fleet.stages > spec.layers:
            raise ValueError(f"{fleet.stages} stages, but {fleet.model} has {spec.layers} blocks: give 1…{spec.layers}")
        if self.streams.steps > spec.max_steps:
            raise ValueError(f"{fleet.model} has {spec.max_steps} denoising steps, not {self.streams.steps}")
        for fault in self.faults:
            if fault.pipeline >= fleet.pipelines or fault.stage >= fleet.stages:
                raise ValueError(
                    f"a fault at pipeline {fault.pipeline}, stage {fault.stage}, but there are {fleet.pipelines} "
                    f"pipelines of {fleet.stages} stages, counted from 0"
                )
        return self


def shipped() -> dict[str, str]:
    """Names and titles of the scenarios that ship."""
    return {path.stem: load_scenario(path.stem).title for path in sorted(SHIPPED.glob("*.toml"))}


def load_scenario(name: str) -> Scenario:
    """A shipped scenario by its name, else a TOML or JSON file. Raises ScenarioError."""
    path = SHIPPED / f"{name}.toml"
    if not path.is_file():
        path = Path(name)
        if not path.is_file():
            known = ", ".join(sorted(each.stem for each in SHIPPED.glob("*.toml")))
            raise ScenarioError(f"no scenario {name!r}: give one of {known}, or a TOML or JSON file")
    try:
        text = path.read_text(encoding="utf-8")
        plain: dict[str, Any] = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (json.JSONDecodeError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        kind = "JSON" if path.suffix == ".json" else "TOML"
        raise ScenarioError(f"{path} is not {kind}: {error}") from None
    return parse_scenario(plain, str(path))


def parse_scenario(plain: Any, where: str = "the scenario") -> Scenario:
    """Validate plain values. Raises ScenarioError that names the first field that will not do."""
    try:
        return Scenario.model_validate(plain)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        raise ScenarioError(f"{where}: {field + ': ' if field else ''}{message}") from None
