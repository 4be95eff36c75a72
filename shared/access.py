"""Who may do what: bearer tokens, hashed at rest, with a role and a tenant. Read by the gateway, made by the CLI.

The file is JSON: ``{"tokens": [{"name": "ci", "sha256": "<hex>", "role": "operator", "tenant": "acme"}]}``.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import stat
from enum import StrEnum
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from shared.contracts.tiers import DEFAULT_TENANT, TENANT_PATTERN

TOKEN_PREFIX = "rheo_"  # noqa: S105 - what a token begins with, so that a scanner finds one that leaked
MAX_TOKENS = 10_000


class Role(StrEnum):
    """What a caller may do, each what those before it may: see; start and change streams; the fleet and every tenant."""

    VIEWER = "viewer"
    OPERATOR = "operator"
    ADMIN = "admin"

    def covers(self, needed: Role) -> bool:
        """Whether this role may do what ``needed`` may."""
        order = list(Role)
        return order.index(self) >= order.index(needed)


class TokenEntry(BaseModel):
    """One token. The secret itself is nowhere: it has 256 random bits, so that a plain SHA-256 cannot be turned back."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1, max_length=64)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    role: Role
    tenant: str = Field(default=DEFAULT_TENANT, pattern=TENANT_PATTERN)


class _File(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    tokens: tuple[TokenEntry, ...] = Field(default=(), max_length=MAX_TOKENS)


class TokensFileError(ValueError):
    """The tokens' file cannot be used; the message is one line and names the fix."""


def hash_token(token: str) -> str:
    """What is kept of a token."""
    return hashlib.sha256(token.encode()).hexdigest()


def new_token(name: str, role: Role, tenant: str = DEFAULT_TENANT) -> tuple[str, TokenEntry]:
    """A token nobody has guessed, to be shown once, and the entry to keep."""
    token = TOKEN_PREFIX + secrets.token_urlsafe(32)
    return token, TokenEntry(name=name, sha256=hash_token(token), role=role, tenant=tenant)


def read_tokens(path: Path) -> dict[str, TokenEntry]:
    """The file's entries by hash. Raises TokensFileError."""
    try:
        held = _File.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise TokensFileError(f"the tokens' file {path} cannot be read: {error.strerror}") from None
    except json.JSONDecodeError as error:
        raise TokensFileError(f"the tokens' file {path} is not JSON: line {error.lineno}: {error.msg}") from None
    except (ValidationError, UnicodeDecodeError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": "it is not UTF-8"}
        place = ".".join(str(part) for part in first["loc"])
        raise TokensFileError(f"the tokens' file {path}: {place or 'the whole'}: {first['msg']}") from None
    return {entry.sha256: entry for entry in held.tokens}


def add_token(path: Path, entry: TokenEntry) -> None:
    """Append an entry, in place of one of the same name. A new file only its owner may read, an old one keeps its mode.

    Raises TokensFileError."""
    kept = [old for old in read_tokens(path).values() if old.name != entry.name] if path.exists() else []
    text = json.dumps({"tokens": [each.model_dump(mode="json") for each in (*kept, entry)]}, indent=1) + "\n"
    fresh = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        fresh.touch(mode=0o600)
        if path.exists():
            fresh.chmod(stat.S_IMODE(path.stat().st_mode))
        fresh.write_text(text, encoding="utf-8")
        fresh.replace(path)  # a reader sees the old file or the new one
    except OSError as error:
        raise TokensFileError(f"the tokens' file {path} cannot be written: {error.strerror}") from None
