"""A service over HTTP: ``/healthz`` (alive) and ``/readyz`` (ready for work), both JSON, and ``/metrics`` (Prometheus)."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable
from typing import Any

READ_S = 2.0
MAX_REQUEST = 8192

Status = Callable[[], tuple[bool, dict[str, Any]]]
Exposition = Callable[[str], tuple[bytes, str]]


class HealthServer:
    """``status()`` gives (ready, what to tell). ``/healthz`` is 200 while the event loop turns, ``/readyz`` 200 or 503.

    ``exposition(accept)`` gives the metrics' page and its content type; None: there are none.
    """

    def __init__(self, status: Status, exposition: Exposition | None = None) -> None:
        self._status = status
        self._exposition = exposition
        self._server: asyncio.Server | None = None
        self.port = -1

    async def start(self, host: str, port: int) -> None:
        """Listen; 0 takes any free port. Raises OSError when the port is taken."""
        self._server = await asyncio.start_server(self._serve, host, port, limit=MAX_REQUEST)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            async with asyncio.timeout(READ_S):
                head = await reader.readuntil(b"\r\n\r\n")
                writer.write(self._answer(head.decode("latin-1")))
                await writer.drain()
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()

    def _answer(self, head: str) -> bytes:
        lines = head.split("\r\n")
        method, _, rest = lines[0].partition(" ")
        path = rest.partition(" ")[0].partition("?")[0]
        status, content_type = "200 OK", "application/json"
        if method in ("GET", "HEAD") and path == "/metrics" and self._exposition is not None:
            body, content_type = self._exposition(_header(lines, "accept"))
            return _response(status, content_type, body, method)
        ready, told = self._status()
        if method not in ("GET", "HEAD"):
            status, told = "405 Method Not Allowed", {"error": "only GET is understood"}
        elif path == "/readyz":
            status = "200 OK" if ready else "503 Service Unavailable"
        elif path != "/healthz":
            status, told = "404 Not Found", {"error": "there are /healthz, /readyz and /metrics"}
        return _response(status, content_type, json.dumps(told, default=str).encode() + b"\n", method)

    async def close(self) -> None:
        """Stop listening."""
        if self._server is not None:
            self._server.close()
            await self._server.wait_closed()
            self._server = None


def _header(lines: list[str], name: str) -> str:
    """The value of a request's header, "" when it has none."""
    for line in lines[1:]:
        key, _, value = line.partition(":")
        if key.strip().lower() == name:
            return value.strip()
    return ""


def _response(status: str, content_type: str, body: bytes, method: str) -> bytes:
    head = (
        f"HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}\r\n"
        "Cache-Control: no-store\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + (b"" if method == "HEAD" else body)
