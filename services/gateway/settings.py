"""The gateway's settings; the only reader of its environment."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, field_validator, model_validator
from pydantic_settings import NoDecode

from services.gateway.ice import IceSettings, urls_of
from shared.config import ServiceSettings
from shared.credentials import read_secret
from shared.media.addresses import AddressRules

NamesList = Annotated[tuple[str, ...], NoDecode]
"""Names joined by commas in the environment."""


class Settings(IceSettings, ServiceSettings):
    """``RHEOCAST_…`` variables of the gateway. ``media_dir`` is the folder that file sources and sinks are named in.

    ``tokens_file``: bearer tokens, hashed (see ``shared/access.py``). None: whoever reaches the port may do everything, which
    is allowed on loopback only, unless ``allow_no_auth`` says that something else stands guard. ``cors_origins``: pages of
    these origins may call the API. ``server_names``: names it is asked by while nobody needs a token, beside localhost and
    addresses.
    """

    gateway_host: str = "127.0.0.1"
    gateway_port: int = Field(default=7860, ge=0, le=65535)
    media_dir: Path = Path("media")
    answer_timeout_s: float = 30.0
    fleet_timeout_s: float = 150.0  # cuts wait for weights that are read from a disk
    capacity_timeout_s: float = 3.0
    tenant_commands_per_s: float = Field(default=20.0, gt=0.0)  # of each tenant, starts and changes together
    tenant_burst: int = Field(default=40, ge=1)  # … and so many at once
    max_body_bytes: int = 1 << 20

    tokens_file: Path | None = None
    allow_no_auth: bool = False
    cors_origins: NamesList = ()
    server_names: NamesList = ()
    allow_private: bool = False  # sources and sinks may lead to private networks
    allowed_hosts: str = ""  # or to these names, addresses and CIDR networks, joined by commas
    requests_per_s: float = Field(default=100.0, gt=0.0)  # of each token, or address without one
    requests_burst: int = Field(default=300, ge=1)
    unknown_tokens_per_s: float = Field(default=2.0, gt=0.0)  # tried from one address
    unknown_tokens_burst: int = Field(default=20, ge=1)
    share_max_s: float = Field(default=7 * 86_400.0, gt=0)  # the longest life of a share link

    max_viewers: int = Field(default=1024, ge=1)  # of pictures and events, over all streams
    upload_max_bytes: int = Field(default=512 << 20, ge=1)
    upload_tenant_bytes: int = Field(default=4 << 30, ge=1)

    jaeger_url: str = Field(default="", pattern=r"^(https?://\S+)?$")  # as a browser reaches it: links to traces

    demo_model: str = ""  # of clients of the public demo's and Scope's protocols; empty: the embedded one
    demo_max_clients: int = Field(default=8, ge=0)
    demo_idle_s: float = Field(default=120.0, gt=0)
    scope_grace_s: float = Field(default=2.0, ge=1, le=3600)  # after a client of Scope's has left, its stream ends

    ice_turn_secret_file: Path | None = None  # whose only line is ice_turn_secret

    @model_validator(mode="after")
    def _turn_secret(self) -> Self:
        if self.ice_turn_secret_file is not None and self.ice_turn:
            self.ice_turn_secret = read_secret(self.ice_turn_secret_file)
        return self

    @field_validator("ice_stun", "ice_turn")
    @classmethod
    def _ice_urls(cls, value: str) -> str:
        urls_of(value)
        return value

    @field_validator("cors_origins", "server_names", mode="before")
    @classmethod
    def _names(cls, value: object) -> object:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value

    @field_validator("cors_origins")
    @classmethod
    def _origins(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for origin in value:
            scheme, _, rest = origin.partition("://")
            if scheme not in ("http", "https") or not rest or "/" in rest or "*" in rest:
                raise ValueError(f"{origin!r} is no origin: write e.g. https://studio.example.com")
        return value

    @property
    def address_rules(self) -> AddressRules:
        """Where sources and sinks may lead to; as ingest and egress have it."""
        return AddressRules.of(self.allow_private, self.allowed_hosts)

    @property
    def on_loopback(self) -> bool:
        """Whether only this machine can reach the port."""
        if self.gateway_host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.gateway_host).is_loopback
        except ValueError:
            return False
