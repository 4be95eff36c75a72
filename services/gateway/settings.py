"""The gateway's settings; the only reader of its environment."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from shared.config import ServiceSettings


class Settings(ServiceSettings):
    """``RHEOCAST_…`` variables of the gateway. ``media_dir`` is the folder that file sources and sinks are named in."""

    gateway_host: str = "127.0.0.1"
    gateway_port: int = Field(default=7860, ge=0, le=65535)
    media_dir: Path = Path("media")
    answer_timeout_s: float = 30.0
    fleet_timeout_s: float = 150.0  # cuts wait for weights that are read from a disk
    capacity_timeout_s: float = 3.0
    tenant_commands_per_s: float = Field(default=20.0, gt=0.0)  # of each tenant, starts and changes together
    tenant_burst: int = Field(default=40, ge=1)  # … and so many at once
    max_body_bytes: int = 1 << 20
