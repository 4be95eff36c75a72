"""STUN and TURN servers for clients, from the settings. Pure; time is passed in."""

from __future__ import annotations

import base64
import hashlib
import hmac
from collections.abc import Iterable

from pydantic import BaseModel, Field

SCHEMES = ("stun:", "stuns:", "turn:", "turns:")


class IceSettings(BaseModel):
    """Settings of the gateway. ``ice_stun`` and ``ice_turn``: URLs joined by ",", e.g. ``turn:turn.example.com:3478``.

    ``ice_turn_secret`` (shared with the TURN server): every client gets credentials of its own for ``ice_turn_ttl_s``;
    else all get ``ice_turn_username`` and ``ice_turn_credential``.
    """

    ice_stun: str = ""
    ice_turn: str = ""
    ice_turn_username: str = ""
    ice_turn_credential: str = ""
    ice_turn_secret: str = ""
    ice_turn_ttl_s: int = Field(default=3600, ge=60, le=7 * 86_400)


class IceServer(BaseModel):
    """One entry of a browser's ``iceServers``."""

    urls: list[str]
    username: str | None = None
    credential: str | None = None


class IceServers(BaseModel):
    """What a client gives its peer connection."""

    iceServers: list[IceServer]


def urls_of(text: str) -> list[str]:
    """The URLs of a setting. Raises ValueError for what is none."""
    urls = [url.strip() for url in text.split(",") if url.strip()]
    for url in urls:
        if not url.startswith(SCHEMES) or any(c in url for c in " <>\"'\r\n"):
            raise ValueError(f"{url!r} is no STUN or TURN URL: write e.g. stun:stun.example.com:3478")
    return urls


def ice_servers(settings: IceSettings, who: str, now_s: float) -> list[IceServer]:
    """Servers for one client. Time-limited credentials: user ``<expiry>:<who>``, HMAC-SHA1 of it by the shared secret."""
    servers: list[IceServer] = []
    if stun := urls_of(settings.ice_stun):
        servers.append(IceServer(urls=stun))
    if turn := urls_of(settings.ice_turn):
        username, credential = settings.ice_turn_username, settings.ice_turn_credential
        if settings.ice_turn_secret:
            username = f"{int(now_s) + settings.ice_turn_ttl_s}:{who}"
            mac = hmac.new(settings.ice_turn_secret.encode(), username.encode(), hashlib.sha1)
            credential = base64.b64encode(mac.digest()).decode()
        servers.append(IceServer(urls=turn, username=username or None, credential=credential or None))
    return servers


def link_headers(servers: Iterable[IceServer]) -> list[str]:
    """The same as Link headers (RFC 9725), one a URL."""
    links: list[str] = []
    for server in servers:
        for url in server.urls:
            link = f'<{url}>; rel="ice-server"'
            if server.username is not None and server.credential is not None:
                user, secret = _quoted(server.username), _quoted(server.credential)
                link += f'; username="{user}"; credential="{secret}"; credential-type="password"'
            links.append(link)
    return links


def _quoted(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"')
