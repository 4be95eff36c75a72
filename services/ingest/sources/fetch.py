"""HTTP for FFmpeg, done by us: every address is checked, redirects included, and the connection goes to what was checked.

FFmpeg itself would follow redirects, and what playlists name, to wherever they lead.
"""

from __future__ import annotations

import http.client
import io
import socket
import ssl
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urljoin, urlsplit

from shared.media.addresses import AddressError, AddressRules, Target, check_url, resolve
from shared.media.errors import MediaError, one_line

SCHEMES = ("http", "https")
MAX_REDIRECTS = 5
MAX_READ_OVER = 64 << 20
REDIRECTS = frozenset({301, 302, 303, 307, 308})


class Patience:
    """How long a server is waited for. It may send byte by byte, so that no single wait says much.

    ``timeout_s`` bounds each wait, and a whole request until its body begins, redirects included. ``until`` (monotonic)
    bounds everything, as long as it is set. Nothing is waited for once ``stopped``.
    """

    def __init__(self, timeout_s: float, stopped: Callable[[], bool] = lambda: False) -> None:
        self.until: float | None = None
        self._timeout_s, self._stopped = timeout_s, stopped
        self._request_until: float | None = None

    def ask(self) -> None:
        """A request begins."""
        self._request_until = time.monotonic() + self._timeout_s

    def answered(self) -> None:
        """The body begins."""
        self._request_until = None

    def left(self) -> float:
        """Seconds that the next wait may last. Raises TimeoutError when there are none."""
        if self._stopped():
            raise TimeoutError("nobody waits for it any more")
        limits = [limit for limit in (self.until, self._request_until) if limit is not None]
        left = min([self._timeout_s, *(limit - time.monotonic() for limit in limits)])
        if left <= 0:
            raise TimeoutError("it answers too slowly")
        return left


class Fetched:
    """One resource as a file to read and seek in. Opening and reading raise OSError or MediaError.

    ``patience`` bounds the waits for the server. Redirects are followed here, each one checked by ``rules``.
    """

    def __init__(self, url: str, rules: AddressRules, patience: Patience) -> None:
        self._url, self._rules, self._patience = url, rules, patience
        self._at = 0
        self._failed = False
        self._size: int | None = None
        self._connection: http.client.HTTPConnection | None = None
        self._response: Any = None
        self._request()

    def read(self, size: int) -> bytes:
        """Up to ``size`` bytes; none at the end, and none after an error: FFmpeg may ask again before it gives up."""
        if self._failed:
            return b""
        try:
            return self._read(size)
        except OSError:
            self._failed = True
            raise

    def _read(self, size: int) -> bytes:
        if self._response is None:
            if self._size is not None and self._at >= self._size:
                return b""
            self._request()
        assert self._response is not None
        data = self._response.read1(size)
        self._at += len(data)
        return data

    def seek(self, offset: int, whence: int = 0) -> int:
        """Where reading goes on. Asks the server anew when that is elsewhere."""
        if whence == 2 and self._size is None:
            raise OSError("the server does not say how long this is")
        to = offset + (self._at if whence == 1 else self._size or 0 if whence == 2 else 0)
        if to != self._at:
            self.close()
            self._at = to
        return to

    def tell(self) -> int:
        """The place of the next byte."""
        return self._at

    def close(self) -> None:
        """Hang up."""
        if self._connection is not None:
            self._connection.close()
        self._connection = self._response = None

    def _request(self) -> None:
        url = self._url
        self._patience.ask()
        for _ in range(MAX_REDIRECTS + 1):
            target = check_url(url, SCHEMES, self._rules)
            response = self._ask(target)
            location = response.getheader("Location")
            if response.status not in REDIRECTS or not location:
                self._patience.answered()
                self._take(response, target)
                return
            self.close()
            url = urljoin(url, location)
        raise MediaError(f"{urlsplit(self._url).hostname}: more than {MAX_REDIRECTS} redirects")

    def _ask(self, target: Target) -> Any:
        connection = _Pinned(target, resolve(target, self._rules)[0], self._patience)
        self._connection = connection
        parts = urlsplit(target.url)
        headers = {"User-Agent": "rheocast", "Accept": "*/*", "Accept-Encoding": "identity", "Connection": "close"}
        if self._at:
            headers["Range"] = f"bytes={self._at}-"
        try:
            connection.request("GET", (parts.path or "/") + (f"?{parts.query}" if parts.query else ""), headers=headers)
            return connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            self.close()
            raise OSError(f"{target.host}: {one_line(error)}") from None

    def _take(self, response: Any, target: Target) -> None:
        whole = self._at > 0 and response.status == 200  # a server without ranges: read over what is before
        if response.status != (206 if self._at else 200) and not (whole and self._at <= MAX_READ_OVER):
            self.close()
            raise OSError(f"{target.host} answers {response.status} {response.reason}")
        length = response.getheader("Content-Length")
        if length is not None and length.isdigit():
            self._size = int(length) if whole else self._at + int(length)
        self._response = response
        left = self._at if whole else 0
        while left and (data := response.read1(min(left, 65_536))):
            left -= len(data)


class _Pinned(http.client.HTTPConnection):
    """A connection to one address, whatever its name leads to by now."""

    def __init__(self, target: Target, address: str, patience: Patience) -> None:
        host = f"[{target.host}]" if ":" in target.host else target.host
        super().__init__(host, target.port)
        self._target, self._address, self._patience = target, address, patience
        if target.scheme == "https":
            self.default_port = 443

    def connect(self) -> None:
        """To the checked address; TLS is for the name."""
        sock = self.sock = socket.create_connection((self._address, self._target.port), self._patience.left())
        if self._target.scheme == "https":
            sock.settimeout(self._patience.left())
            sock = ssl.create_default_context().wrap_socket(sock, server_hostname=self._target.host)
        self.sock = _Patient(sock, self._patience)


class _Patient:
    """A socket as ``http.client`` uses it, whose every wait asks ``patience`` how long it may be."""

    def __init__(self, sock: socket.socket, patience: Patience) -> None:
        self._sock, self._patience = sock, patience

    def sendall(self, data: bytes) -> None:
        """All of it; Python bounds that as a whole."""
        self._sock.settimeout(self._patience.left())
        self._sock.sendall(data)

    def makefile(self, mode: str) -> io.BufferedReader:
        """What comes. The socket is open until both are closed."""
        return patient_reads(self._sock, self._patience)

    def close(self) -> None:
        """Of this and the files made of it, the last one hangs up."""
        self._sock.close()


def patient_reads(sock: socket.socket, patience: Patience) -> io.BufferedReader:
    """What comes from a socket, waited for as long as ``patience`` says. Reading raises OSError."""
    return io.BufferedReader(_PatientReads(sock, patience), 65_536)


class _PatientReads(io.RawIOBase):
    def __init__(self, sock: socket.socket, patience: Patience) -> None:
        self._sock, self._patience = sock, patience
        self._raw = sock.makefile("rb", buffering=0)

    def readable(self) -> bool:
        return True

    def readinto(self, into: Any) -> int | None:
        self._sock.settimeout(self._patience.left())
        return self._raw.readinto(into)

    def close(self) -> None:
        self._raw.close()
        super().close()


def opener(rules: AddressRules, patience: Patience) -> Any:
    """What PyAV calls for every URL of a container, ``io_open(url, flags, options)``."""

    def io_open(url: str, flags: int, options: dict[str, str]) -> Fetched:
        if flags & 2:
            raise AddressError("a source is only read")
        return Fetched(url, rules, patience)

    return io_open
