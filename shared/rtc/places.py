"""Where a service's WebRTC sockets are opened, from its settings."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass

from pydantic import BaseModel, Field, field_validator

_PORTS = re.compile(r"(\d{1,5})-(\d{1,5})")
EVERY = "every"  # every address of this machine but loopback


@dataclass(frozen=True, slots=True)
class Places:
    """``hosts`` to bind (``every``: each address of the machine), UDP ``ports`` (0, 0: any), ``public``: told instead."""

    hosts: tuple[str, ...] = ("127.0.0.1",)
    ports: tuple[int, int] = (0, 0)
    public: str = ""


class RtcSettings(BaseModel):
    """Settings of a service whose peers come by WebRTC.

    ``rtc_hosts``: addresses to bind, joined by "," (``every``: each address of the machine but loopback; loopback by default).
    ``rtc_ports``: "40000-40199", the UDP ports to use; empty: any. ``rtc_public_ip``: told to peers instead of the bound
    address, behind a 1:1 NAT.
    """

    rtc_hosts: str = "127.0.0.1"
    rtc_ports: str = ""
    rtc_public_ip: str = ""
    rtc_connect_s: float = Field(default=20.0, gt=0)  # a peer that is not connected by then is given up

    @field_validator("rtc_hosts")
    @classmethod
    def _hosts(cls, value: str) -> str:
        for host in value.split(","):
            if host.strip() != EVERY:
                _address(host.strip(), "rtc_hosts")
        return value

    @field_validator("rtc_public_ip")
    @classmethod
    def _public(cls, value: str) -> str:
        if value:
            _address(value, "rtc_public_ip")
        return value

    @field_validator("rtc_ports")
    @classmethod
    def _port_range(cls, value: str) -> str:
        found = _PORTS.fullmatch(value)
        if value and (found is None or not 1024 <= int(found.group(1)) <= int(found.group(2)) <= 65535):
            raise ValueError(f'rtc_ports {value!r} will not do: give a range above 1023, e.g. "40000-40199"')
        return value

    @property
    def places(self) -> Places:
        """The same, parsed."""
        found = _PORTS.fullmatch(self.rtc_ports)
        ports = (int(found.group(1)), int(found.group(2))) if found is not None else (0, 0)
        return Places(tuple(host.strip() for host in self.rtc_hosts.split(",")), ports, self.rtc_public_ip)


def _address(value: str, name: str) -> None:
    try:
        ipaddress.ip_address(value)
    except ValueError:
        raise ValueError(f"{name}: {value!r} is no address; give e.g. 127.0.0.1") from None
