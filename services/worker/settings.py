"""The worker's settings; the only reader of its environment."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import field_validator
from pydantic_settings import NoDecode

from services.worker.core import Role
from shared.config import ServiceSettings


class Settings(ServiceSettings):
    """``RHEOCAST_…`` variables of a worker. ``roles`` is a comma-separated list."""

    roles: Annotated[tuple[Role, ...], NoDecode] = (Role.TEXT, Role.ENCODE, Role.STAGE, Role.DECODE)
    model: str = "rheo-tiny"
    models_dir: Path | None = None  # None: the models that ship with the package
    pipeline: str = "p0"
    stage: int = 0
    stages: int = 1
    device: str = "auto"  # auto, cpu, cuda, cuda:1, …
    dtype: str = "auto"  # auto, float32, bfloat16
    gap_timeout_s: float = 0.5  # a missing batch is a pipeline fault after this
    max_streams: int = 16

    @field_validator("roles", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value
