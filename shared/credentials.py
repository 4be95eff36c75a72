"""Who a process is to NATS and Redis: a user, a password from a file, and the authority that their certificates come from."""

from __future__ import annotations

import ssl
from dataclasses import dataclass, field
from pathlib import Path

MAX_PASSWORD = 4096


@dataclass(frozen=True, slots=True)
class Credentials:
    """``user`` "": nobody in particular. ``ca``: a PEM file; None: the system's authorities."""

    user: str = ""
    password: str = field(default="", repr=False)
    ca: Path | None = None

    @classmethod
    def of(cls, user: str, password_file: Path | None, ca: Path | None) -> Credentials:
        """From settings. Raises ValueError, in one line, for a file that cannot be read."""
        if ca is not None and not ca.is_file():
            raise ValueError(f"RHEOCAST_TLS_CA: there is no file {ca}")
        return cls(user, read_secret(password_file) if password_file is not None else "", ca)

    def tls(self) -> ssl.SSLContext:
        """For connections that are to be encrypted: the server's name and certificate are checked."""
        return ssl.create_default_context(cafile=None if self.ca is None else str(self.ca))


NOBODY = Credentials()


def read_secret(path: Path) -> str:
    """A file's only line. Raises ValueError, in one line that names the file and never what is in it."""
    try:
        text = path.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise ValueError(f"the secret in {path} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise ValueError(f"the secret in {path} is no text") from None
    if not text or "\n" in text or len(text) > MAX_PASSWORD:
        raise ValueError(f"the secret in {path} must be one line of 1 to {MAX_PASSWORD} characters")
    return text


def without_password(url: str) -> str:
    """A URL as it may be shown. It need not be a right one: a password may hold a "/" that nobody has escaped."""
    scheme, separator, rest = url.partition("://")
    if "@" not in rest:
        return url
    return f"{scheme}{separator}…@{rest.rpartition('@')[2]}"
