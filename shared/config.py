"""Settings that every service has. Each service subclasses ``ServiceSettings`` in its ``settings.py``."""

from __future__ import annotations

import re
import secrets
from pathlib import Path
from typing import Any, Self

from pydantic import AliasChoices, Field, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

DEFAULT_NATS_URL = "nats://127.0.0.1:4222"
DEFAULT_REDIS_URL = "redis://127.0.0.1:6379/0"

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


class ServiceSettings(BaseSettings):
    """``RHEOCAST_…`` variables that every service reads.

    ``instance`` names the process on the bus; an empty one becomes "<service>-<8 hex>". ``health_port`` 0 takes any free
    port, −1 opens none. ``bus_faults`` is for tests only: "drop=0.01,duplicate=0.01,delay=0.01,seed=1". ``threads`` 0
    leaves thread counts as they are. ``otlp_endpoint`` also reads the standard OTEL_EXPORTER_OTLP_ENDPOINT; empty: no
    telemetry is exported. ``log_json``: logs are one JSON object a line; not set: unless stderr is a terminal.
    ``parent_pid``: the service stops when that process is gone.
    """

    model_config = SettingsConfigDict(env_prefix="RHEOCAST_", extra="ignore", populate_by_name=True)

    nats_url: str = DEFAULT_NATS_URL
    redis_url: str = DEFAULT_REDIS_URL
    instance: str = ""
    run_id: str = "local"
    shm_dir: Path = Path("/dev/shm")  # noqa: S108
    shm_max_mb: int = Field(default=1024, ge=1)  # the most shared memory this process may hold
    health_host: str = "127.0.0.1"
    health_port: int = Field(default=0, ge=-1, le=65535)
    log_level: str = "INFO"
    log_json: bool | None = None
    drain_s: float = Field(default=10.0, ge=0.0)
    bus_faults: str = ""
    threads: int = Field(default=0, ge=0)
    models_dir: Path | None = None  # None: the models that ship with the package
    parent_pid: int = Field(default=0, ge=0)
    otlp_endpoint: str = Field(
        default="", validation_alias=AliasChoices("RHEOCAST_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
    )

    @field_validator("instance", "run_id")
    @classmethod
    def _name(cls, value: str) -> str:
        if value and not _NAME.fullmatch(value):
            raise ValueError(f"{value!r} will not do: 1–64 letters, digits, '-' or '_'")
        return value

    @field_validator("log_level")
    @classmethod
    def _level(cls, value: str) -> str:
        if value.upper() not in ("DEBUG", "INFO", "WARNING", "ERROR"):
            raise ValueError(f"{value!r} is no log level: DEBUG, INFO, WARNING or ERROR")
        return value.upper()

    def named(self, service: str) -> Self:
        """These settings with a unique ``instance``, if none was given."""
        if self.instance:
            return self
        update: dict[str, Any] = {"instance": f"{service}-{secrets.token_hex(4)}"}
        return self.model_copy(update=update)
