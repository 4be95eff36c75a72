"""Which addresses a user may send us to: schemes from a list, and no private network unless the operator says so.

An address is checked when it is given and again before every opening: names may point elsewhere by then.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Collection
from dataclasses import dataclass
from urllib.parse import urlsplit

from shared.media.errors import MediaError

MAX_URL = 2048
DEFAULT_PORTS = {"rtmp": 1935, "rtmps": 443, "rtsp": 554, "rtsps": 322, "http": 80, "https": 443}

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class AddressError(MediaError):
    """An address that may not be used. The message is one line and names what would do."""


@dataclass(frozen=True, slots=True)
class AddressRules:
    """``private``: private, loopback and link-local addresses are fine. ``hosts``: names or CIDR networks that always are."""

    private: bool = False
    hosts: tuple[str, ...] = ()

    @classmethod
    def of(cls, private: bool, hosts: str) -> AddressRules:
        """From settings: ``hosts`` is joined by commas."""
        return cls(private, tuple(host.strip().lower() for host in hosts.split(",") if host.strip()))


@dataclass(frozen=True, slots=True)
class Target:
    """Where an address leads, as far as its text tells."""

    url: str
    scheme: str
    host: str
    port: int


def check_url(url: str, schemes: Collection[str], rules: AddressRules = AddressRules()) -> Target:
    """What can be said without asking anybody. Raises AddressError."""
    if len(url) > MAX_URL or any(ord(char) <= 0x20 or ord(char) == 0x7F for char in url) or "\\" in url:
        raise AddressError(
            f"an address has at most {MAX_URL} characters, and no spaces, control characters or backslashes"
        )
    try:
        parts = urlsplit(url)
        host, port = (parts.hostname or "").rstrip("."), parts.port
    except ValueError as error:
        raise AddressError(f"this is no address: {error}") from None
    scheme = parts.scheme.lower()
    if scheme not in schemes:
        raise AddressError(f"addresses begin with {', '.join(f'{each}://' for each in sorted(schemes))}")
    if not host:
        raise AddressError(f"{scheme}:// needs a host")
    target = Target(url, scheme, host, port or DEFAULT_PORTS.get(scheme, 0))
    if (literal := _literal(host)) is not None:
        _check_address(literal, host, rules)
    elif not rules.private and host not in rules.hosts and (host == "localhost" or host.endswith(".localhost")):
        raise _refused(host)
    return target


def resolve(target: Target, rules: AddressRules = AddressRules()) -> list[str]:
    """Its addresses, each one checked. Blocks on the name service. Raises AddressError."""
    try:
        found = socket.getaddrinfo(target.host, target.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise AddressError(f"{target.host}: there is no such host ({error})") from None
    addresses = list(dict.fromkeys(str(entry[4][0]).partition("%")[0] for entry in found))
    if not addresses:
        raise AddressError(f"{target.host}: it has no address")
    for address in addresses:
        _check_address(ipaddress.ip_address(address), target.host, rules)
    return addresses


def _literal(host: str) -> Address | None:
    """An address that stands for itself, in any spelling that a C library takes: 127.1, 0x7f.1, 2130706433."""
    try:
        return ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        pass
    try:
        return ipaddress.IPv4Address(socket.inet_aton(host))
    except OSError:
        return None


def _check_address(address: Address, host: str, rules: AddressRules) -> None:
    for inner in (getattr(address, "ipv4_mapped", None), getattr(address, "sixtofour", None)):
        if inner is not None:
            address = inner
    if host in rules.hosts or any(address in network for network in _networks(rules.hosts)):
        return
    if address.is_multicast or address.is_unspecified or (address.is_reserved and address.version == 4):
        raise AddressError(f"{host}: nobody can be reached at such an address")
    if not rules.private and not address.is_global:
        raise _refused(host)


def _networks(hosts: Collection[str]) -> list[ipaddress.IPv4Network | ipaddress.IPv6Network]:
    found: list[ipaddress.IPv4Network | ipaddress.IPv6Network] = []
    for host in hosts:
        try:
            found.append(ipaddress.ip_network(host, strict=False))
        except ValueError:
            continue
    return found


def _refused(host: str) -> AddressError:
    return AddressError(
        f"{host}: an address in a private network; the operator allows it by RHEOCAST_ALLOWED_HOSTS (this host) or "
        "RHEOCAST_ALLOW_PRIVATE=true (all)"
    )
