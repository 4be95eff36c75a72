"""Who is asking: a bearer token, a share link, or, where nobody needs one, anybody. Decisions only; no web, no I/O but
the tokens' file."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import logging
import secrets
from dataclasses import dataclass
from pathlib import Path

from services.gateway.settings import Settings
from shared.access import Role, TokenEntry, TokensFileError, hash_token, read_tokens
from shared.contracts import subjects
from shared.contracts.tiers import DEFAULT_TENANT
from shared.lifecycle import UnusableError

log = logging.getLogger(__name__)

LOOK_AGAIN_S = 2.0  # how often the tokens' file is looked at
SHARE_PREFIX = "share_"
MAX_SECRET_CHARS = 512


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks. ``stream``: a share link's, which may see this one stream. ``share`` is the link's id.

    ``open``: nobody needs a token here, so the tenant is the header's.
    """

    name: str
    role: Role
    tenant: str = DEFAULT_TENANT
    stream: str = ""
    share: str = ""
    open: bool = False

    def may_see(self, stream: str, tenant: str) -> bool:
        """Whether a stream of this tenant is there for the caller at all."""
        if self.stream:
            return stream == self.stream
        return self.role is Role.ADMIN or tenant == self.tenant


ANYBODY = Caller("anybody", Role.ADMIN, open=True)


def check_settings(settings: Settings) -> None:
    """Raises UnusableError when everybody on a network could do everything, and nobody has said so."""
    if settings.tokens_file is None and not settings.on_loopback and not settings.allow_no_auth:
        raise UnusableError(
            f"listening on {settings.gateway_host} without tokens would let anyone in: set RHEOCAST_TOKENS_FILE to a file "
            "made by `rheocast token`, or RHEOCAST_ALLOW_NO_AUTH=1 if something else stands guard"
        )


class Tokens:
    """The tokens' file, read again when it changes: a token that is taken out is worth nothing within seconds."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._by_hash: dict[str, TokenEntry] = {}
        self._stamp: tuple[int, int] = (0, 0)
        self._looked_s = float("-inf")

    def load(self) -> None:
        """Read it. Raises TokensFileError."""
        found = self._path.stat() if self._path.exists() else None
        self._by_hash = read_tokens(self._path)
        self._stamp = (found.st_mtime_ns, found.st_size) if found is not None else (0, 0)

    def find(self, token: str, now_s: float) -> TokenEntry | None:
        """The entry of a token, or None."""
        if now_s - self._looked_s >= LOOK_AGAIN_S:
            self._looked_s = now_s
            self._look()
        return self._by_hash.get(hash_token(token))

    def _look(self) -> None:
        try:
            found = self._path.stat()
            if (found.st_mtime_ns, found.st_size) != self._stamp:
                self.load()
                log.info("the tokens' file was read again: %d tokens", len(self._by_hash))
        except (OSError, TokensFileError) as error:
            log.warning("the tokens' file is kept as it was: %s", error)


@dataclass(frozen=True, slots=True)
class Share:
    """What a share link says: this stream, until then (UNIX seconds)."""

    id: str
    stream: str
    until: int


def sign_share(share: Share, key: bytes) -> str:
    """The link's token: its words and their HMAC-SHA256."""
    words = _b64(json.dumps([share.id, share.stream, share.until], separators=(",", ":")).encode())
    return f"{SHARE_PREFIX}{words}.{_b64(_mac(words, key))}"


def read_share(token: str, key: bytes, now: float) -> Share | None:
    """What a share link's token says, if it was signed by us and is not over. Whether it was revoked says the store."""
    words, _, mac = token.removeprefix(SHARE_PREFIX).partition(".")
    try:
        if not hmac.compare_digest(_unb64(mac), _mac(words, key)):
            return None
        number, stream, until = json.loads(_unb64(words))
    except (ValueError, TypeError, binascii.Error):
        return None
    if not isinstance(until, int) or until <= now or not subjects.is_token(str(stream)):
        return None
    return Share(str(number), str(stream), until)


def new_share_id() -> str:
    """A share's id."""
    return secrets.token_hex(8)


def _mac(words: str, key: bytes) -> bytes:
    return hmac.digest(key, words.encode(), hashlib.sha256)


def _b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _unb64(text: str) -> bytes:
    return base64.urlsafe_b64decode(text.encode() + b"=" * (-len(text) % 4))
