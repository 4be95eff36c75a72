"""Makes every user's passwords once, and the servers' files from them. What is there already is kept.

Layout, a folder for each who mounts it: ``<service>/{nats,redis}`` (and ``gateway/turn``), ``platform/nats``,
``nats/{passwords,leaf}.conf``, ``redis/users.acl``, ``turn/turnserver.conf``.
"""

from __future__ import annotations

import os
import re
import secrets
from pathlib import Path

from shared.credentials import read_secret
from shared.operated.bus_users import LEAF_USERS, USERS, password_variable
from shared.operated.store_users import RIGHTS, acl

FOLDERS = (*USERS, "nats", "redis", "turn")
PASSWORD_BYTES = 24


def prepare(folder: Path) -> None:
    """Idempotent: to change a password, delete its file, do this again, and restart its server and its user.

    Raises OSError where a folder cannot be written, ValueError for a password that is none.
    """
    bus = {user: _password(folder / user / "nats") for user in USERS}
    store = {user: _password(folder / user / "redis") for user in RIGHTS}
    turn = _password(folder / "gateway" / "turn")
    lines = (f'{password_variable(user)}: "{password}"\n' for user, password in bus.items())
    _write(folder / "nats" / "passwords.conf", "".join(lines))
    leaf = _password(folder / "nats" / "leaf")
    _write(folder / "nats" / "leaf.conf", f'LEAF_PASSWORD: "{leaf}"\n')
    _write(folder / "redis" / "users.acl", acl(store))
    _write(folder / "turn" / "turnserver.conf", f"use-auth-secret\nstatic-auth-secret={turn}\n")


def leaf(folder: Path, address: str) -> str:
    """What a second host's leaf node needs to know, from prepared secrets: the text of its ``secrets/upstream.conf``.

    ``address``: the first host's. Raises OSError where nothing is prepared, ValueError for what is no address.
    """
    if not re.fullmatch(r"[A-Za-z0-9.\-]+|\[[0-9A-Fa-f:]+\]", address):
        raise ValueError(f"{address!r} is no host name and no address (IPv6 in brackets)")
    lines = [f'{password_variable(user)}: "{read_secret(folder / user / "nats")}"' for user in LEAF_USERS]
    lines.append(f'LEAF_URL: "tls://leaf:{read_secret(folder / "nats" / "leaf")}@{address}:7422"')
    return "\n".join(lines) + "\n"


def _password(path: Path) -> str:
    if not path.exists():
        _write(path, secrets.token_urlsafe(PASSWORD_BYTES) + "\n")
    password = read_secret(path)
    if not set(password) <= _SAFE:
        raise ValueError(
            f"the password in {path} has characters that configuration files give a meaning: use A-Z a-z 0-9 - _"
        )
    return password


_SAFE = set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_")


def _write(path: Path, text: str) -> None:
    """Whole or not at all, for the owner alone."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    fresh.unlink(missing_ok=True)  # of a process that was cut off, and had this number too, as it is in a container
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o400)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(fresh, path)
