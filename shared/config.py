"""Settings that every service has. Each service subclasses ``ServiceSettings`` in its ``settings.py``."""

from __future__ import annotations

import re
import secrets
from pathlib import Path
from typing import Any, Self

from pydantic import AliasChoices, Field, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from shared.credentials import Credentials

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

    NATS and Redis as operated (``deploy/``) ask for a user and a password, which is the only line of a file. ``tls_ca``: the
    authority of their certificates, a PEM file, for URLs that begin with ``tls://`` and ``rediss://``. ``nats_on_disk``:
    commands and events outlive a restart of NATS; all services must say the same. ``nats_domain``: the JetStream domain, for a
    service behind a leaf node, which has no JetStream of its own; empty: the server's own.
    """

    model_config = SettingsConfigDict(env_prefix="RHEOCAST_", extra="ignore", populate_by_name=True)

    nats_url: str = DEFAULT_NATS_URL
    redis_url: str = DEFAULT_REDIS_URL
    nats_user: str = ""
    nats_password_file: Path | None = None
    nats_on_disk: bool = False
    nats_domain: str = Field(default="", pattern=r"^[A-Za-z0-9_-]*$")
    redis_user: str = ""
    redis_password_file: Path | None = None
    tls_ca: Path | None = None
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

    @property
    def nats_credentials(self) -> Credentials:
        """Raises ValueError, in one line, when a file cannot be read."""
        return Credentials.of(self.nats_user, self.nats_password_file, self.tls_ca)

    @property
    def redis_credentials(self) -> Credentials:
        """Raises ValueError, in one line, when a file cannot be read."""
        return Credentials.of(self.redis_user, self.redis_password_file, self.tls_ca)

    @field_validator("nats_user", "redis_user")
    @classmethod
    def _user(cls, value: str) -> str:
        if value and not _NAME.fullmatch(value):
            raise ValueError(f"{value!r} is no user: 1–64 letters, digits, '-' or '_'")
        return value

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
