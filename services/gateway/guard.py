"""What every request passes first: host and origin, rate, token; and what every answer carries. Denies by default."""

from __future__ import annotations

import ipaddress
import math
import re
import time
from collections.abc import Mapping
from urllib.parse import parse_qs, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.gateway.auth import ANYBODY, MAX_SECRET_CHARS, SHARE_PREFIX, Caller, Tokens, read_share
from services.gateway.problems import problem
from services.gateway.settings import Settings
from services.gateway.shares import Shares
from shared.access import Role
from shared.rates import Rates
from shared.session.port import StoreError

SAFE = frozenset({"GET", "HEAD", "OPTIONS"})
PROTECTED = ("/v1", "/api")
"""Below these everything needs a token; elsewhere are the page's files and the API's description, to be read by anybody."""
BY_QUERY = re.compile(
    r"/v1/streams/[^/]+/(snapshot\.jpg|source\.jpg|mjpeg|source/mjpeg|ws|events|hls/[\w.-]+)"
    r"|/v1/recordings/[\w./-]+|/v1/models/[^/]+/styles/[^/]+\.webp|/api/(ws|stream)/[^/]+"
)
"""GETs for which a browser cannot send a header (img, video, EventSource, WebSocket): there ``?token=`` will do."""
CSP = (
    "default-src 'self'; img-src 'self' blob: data:; media-src 'self' blob: mediastream:; object-src 'none'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": CSP,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "permissions-policy": "camera=(self), microphone=(self), display-capture=(self), geolocation=()",
}


class Denied(Exception):
    """The request goes no further: a status, a title, what would do, and how long to wait."""

    def __init__(self, status: int, title: str, detail: str, wait_s: float = 0.0) -> None:
        super().__init__(detail)
        self.status, self.title, self.detail, self.wait_s = status, title, detail, wait_s


class Guard:
    """ASGI middleware, the outermost. Leaves the caller in ``scope["state"]["caller"]``; counts denials in ``denied``."""

    def __init__(
        self, app: ASGIApp, settings: Settings, tokens: Tokens | None, shares: Shares, denied: dict[str, int]
    ) -> None:
        self._app, self._settings, self._tokens, self._shares = app, settings, tokens, shares
        self._rates = Rates(settings.requests_per_s, settings.requests_burst)
        self._bad_tokens = Rates(settings.unknown_tokens_per_s, settings.unknown_tokens_burst)
        self._denied = denied

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        try:
            caller = await self._admit(scope)
        except Denied as denied:
            kind = f"denied_{denied.title.lower().replace(' ', '_')}"
            self._denied[kind] = self._denied.get(kind, 0) + 1
            await _deny(denied, scope, receive, send)
            return
        scope.setdefault("state", {})["caller"] = caller
        await self._app(scope, receive, _Dressed(scope, send))

    async def _admit(self, scope: Scope) -> Caller | None:
        headers = Headers(scope=scope)
        if self._tokens is None and not host_is_safe(headers.get("host", ""), self._settings.server_names):
            raise Denied(
                421,
                "Unknown host",
                f"{headers.get('host', '')[:80]!r} is no name of this server: ask by localhost or its address, or add the "
                "name to RHEOCAST_SERVER_NAMES",
            )
        unsafe = scope["type"] == "websocket" or scope["method"] not in SAFE
        origin = headers.get("origin")
        if (
            unsafe
            and origin is not None
            and not origin_is_safe(origin, headers.get("host", ""), self._settings.cors_origins)
        ):
            raise Denied(
                403, "Foreign origin", f"pages of {origin[:80]!r} may not do this: add it to RHEOCAST_CORS_ORIGINS"
            )
        caller = await self._caller(scope, headers)
        known = caller is not None and not caller.open
        who = f"{caller.name}:{caller.share}" if caller is not None and known else _address(scope)
        wait_s = self._rates.take(who, time.monotonic())
        if wait_s > 0:
            raise Denied(429, "Too many requests", f"more than {self._settings.requests_per_s:g} a second", wait_s)
        return caller

    async def _caller(self, scope: Scope, headers: Headers) -> Caller | None:
        """Who asks; None for nobody known, on a public path. Raises Denied."""
        public = scope["type"] == "http" and scope["method"] in SAFE and not scope["path"].startswith(PROTECTED)
        token = token_of(scope, headers)
        if token and token.startswith(SHARE_PREFIX):
            share = await self._shared(token, scope)
            return Caller("share", Role.VIEWER, share[1], stream=share[0], share=share[2])
        if self._tokens is None:
            return ANYBODY
        if token is None:
            if public:
                return None
            raise Denied(401, "Token needed", "send 'Authorization: Bearer <token>'; `rheocast token` makes one")
        entry = self._tokens.find(token, time.monotonic()) if len(token) <= MAX_SECRET_CHARS else None
        if entry is None:
            self._blame(scope)
            raise Denied(401, "Token unknown", "this token is not one of ours, or not any more")
        return Caller(entry.name, entry.role, entry.tenant)

    async def _shared(self, token: str, scope: Scope) -> tuple[str, str, str]:
        """(stream, tenant, share). Raises Denied."""
        try:
            key = await self._shares.key()
            share = read_share(token, key, time.time()) if len(token) <= MAX_SECRET_CHARS else None
            tenant = await self._shares.tenant_of(share) if share is not None else None
        except StoreError:
            raise Denied(503, "No answer", "share links cannot be checked now: try again", 1.0) from None
        if share is None or tenant is None:
            self._blame(scope)
            raise Denied(401, "Link over", "this share link is over, or was taken back: ask for a new one")
        return share.stream, tenant, share.id

    def _blame(self, scope: Scope) -> None:
        """Nobody may try tokens one after the other. Raises Denied."""
        wait_s = self._bad_tokens.take(_address(scope), time.monotonic())
        if wait_s > 0:
            raise Denied(429, "Too many requests", "too many unknown tokens from this address", wait_s)


def token_of(scope: Mapping[str, object], headers: Headers) -> str | None:
    """The request's token: of the header, or of the query where a header cannot be sent."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and token.strip():
        return token.strip()
    if scope["type"] == "http" and scope["method"] not in ("GET", "HEAD"):
        return None
    if not BY_QUERY.fullmatch(str(scope["path"])):
        return None
    query = scope["query_string"]
    found = parse_qs(query.decode("latin-1") if isinstance(query, bytes) else "", max_num_fields=20).get("token")
    return found[0] if found else None


def host_is_safe(host: str, allowed: tuple[str, ...]) -> bool:
    """Whether a page of somebody else's name cannot have led here: DNS may point any name at this machine."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return False
    if name == "localhost" or name in (each.lower() for each in allowed):
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def origin_is_safe(origin: str, host: str, allowed: tuple[str, ...]) -> bool:
    """Whether the page that asks is our own, or one of those that may."""
    scheme, _, rest = origin.partition("://")
    return origin in allowed or (scheme in ("http", "https") and rest.lower() == host.lower() != "")


def _address(scope: Scope) -> str:
    client = scope.get("client")
    return str(client[0]) if client else "unknown"


async def _deny(denied: Denied, scope: Scope, receive: Receive, send: Send) -> None:
    more = {"retry_after_s": math.ceil(denied.wait_s)} if denied.wait_s > 0 else {}
    answer = problem(denied.status, denied.title, denied.detail, **more)
    if denied.status == 401:
        answer.headers["WWW-Authenticate"] = "Bearer"
    if denied.wait_s > 0:
        answer.headers["Retry-After"] = str(max(1, math.ceil(denied.wait_s)))
    if scope["type"] == "websocket" and "websocket.http.response" not in scope.get("extensions", {}):
        await send({"type": "websocket.close", "code": 1008})
        return
    await answer(scope, receive, _Dressed(scope, send))


class _Dressed:
    """``send`` that gives every answer the security headers, and every error a problem for its body."""

    def __init__(self, scope: Scope, send: Send) -> None:
        self._scope, self._send = scope, send
        self._replaced = False

    async def __call__(self, message: Message) -> None:
        """Send one message of the answer."""
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in HEADERS.items():
                headers.setdefault(name, value)
            if self._scope["path"].startswith(("/v1/", "/api/")):
                headers.setdefault("cache-control", "no-store")
            plain = not headers.get("content-type", "").startswith("application/problem+json")
            if message["status"] >= 400 and plain and self._scope.get("method") != "HEAD":
                await self._replace(message, headers)
                return
        elif self._replaced and message["type"] == "http.response.body":
            return
        await self._send(message)

    async def _replace(self, message: Message, headers: MutableHeaders) -> None:
        """An error of the framework's own, in plain text."""
        self._replaced = True
        status = message["status"]
        detail = "the range is not within the file" if status == 416 else "the request cannot be answered as it is"
        made = problem(status, "HTTP error", detail)
        for name in ("content-type", "content-length"):
            headers[name] = made.headers[name]
        await self._send(message)
        await self._send({"type": "http.response.body", "body": made.body})
