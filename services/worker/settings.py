"""The worker's settings; the only reader of its environment."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, field_validator, model_validator
from pydantic_settings import NoDecode

from services.worker.core import Role
from shared.config import ServiceSettings
from shared.engine.compile import Speed
from shared.engine.plan.model_parts import Part
from shared.engine.plan.spec import VaeKind


class Settings(ServiceSettings):
    """``RHEOCAST_…`` variables of a worker. ``roles`` is a comma-separated list.

    ``seat``: this worker's number among all that are alike, from 0 (a StatefulSet's ordinal). Its pipeline and stage follow
    from it and ``stages``: with 2 stages, seat 5 is stage 1 of p2. So do the roles, unless they are given: text and
    encode at the first stage, decode at the last.
    """

    roles: Annotated[tuple[Role, ...], NoDecode] = (Role.TEXT, Role.ENCODE, Role.STAGE, Role.DECODE)
    model: str = "rheo-tiny"
    pipeline: str = "p0"
    stage: int = 0
    stages: int = Field(default=1, ge=1)
    seat: int = Field(default=-1, ge=-1)  # −1: ``pipeline`` and ``stage`` are as given
    device: str = "auto"  # auto, cpu, cuda, cuda:1, …
    dtype: str = "auto"  # auto, float32, bfloat16
    speed: Speed = Speed.AUTO  # auto, eager, compiled, graphs (see shared/engine/compile.py)
    fp8: bool = False  # the DiT's products in 8 bits: a GPU of capability 8.9 and torchao
    vae: str = "auto"  # auto (the model's own), wan, taehv, wan+taehv (the full encoder, the tiny decoder)
    text_device: str = "auto"  # auto (the worker's, if there is room for it there), cpu, cuda, cuda:1, …
    # Where parts of the model are, if not where find_parts looks: a file or a folder each.
    dit: Path | None = None
    vae_weights: Path | None = None  # of the full autoencoder
    taehv_weights: Path | None = None  # of the tiny one
    text_weights: Path | None = None  # with the tokenizer beside it
    gap_timeout_s: float = 0.5  # a missing batch is a pipeline fault after this
    max_streams: int = 16
    calibrate_s: float = 1.0  # how long the start may measure what forwards of various shapes cost; 0: not at all
    fence_s: float = 1.5  # who stood still for so long comes back empty; the scheduler's beat_timeout_s
    loras: Annotated[tuple[tuple[str, float], ...], NoDecode] = ()  # "path:scale,path:scale", merged when loading

    @field_validator("loras", mode="before")
    @classmethod
    def _pairs(cls, value: object) -> object:
        """A path may hold colons: the scale is what follows the last one, if that is no part of a path; else 1."""
        if not isinstance(value, str):
            return value
        pairs: list[tuple[str, float]] = []
        for part in filter(None, (part.strip() for part in value.split(","))):
            path, colon, scale = part.rpartition(":")
            if not colon or "/" in scale:
                pairs.append((part, 1.0))
                continue
            try:
                pairs.append((path, float(scale)))
            except ValueError:
                raise ValueError(f"{part!r}: {scale!r} is no number: write path:scale") from None
        return tuple(pairs)

    @field_validator("vae")
    @classmethod
    def _known_vae(cls, value: str) -> str:
        if value not in ("auto", *VaeKind):
            raise ValueError(f"{value!r} is no autoencoder: auto, {', '.join(VaeKind)}")
        return value

    @model_validator(mode="after")
    def _seated(self) -> Self:
        if self.seat < 0:
            return self
        given = {"pipeline", "stage"} & self.model_fields_set
        if given:
            raise ValueError(f"a seat says the pipeline and the stage: leave {' and '.join(sorted(given))} out")
        pipeline, self.stage = divmod(self.seat, self.stages)
        self.pipeline = f"p{pipeline}"
        if "roles" not in self.model_fields_set:
            first = (Role.TEXT, Role.ENCODE) if self.stage == 0 else ()
            last = (Role.DECODE,) if self.stage == self.stages - 1 else ()
            self.roles = (*first, Role.STAGE, *last)
        return self

    @property
    def part_paths(self) -> dict[Part, Path | None]:
        """The parts of the model whose place is set."""
        return {
            Part.DIT: self.dit,
            Part.VAE: self.vae_weights,
            Part.TAEHV: self.taehv_weights,
            Part.TEXT: self.text_weights,
        }

    @field_validator("roles", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value
