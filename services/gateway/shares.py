"""Share links: one stream, to look at, for a time. Signed, and kept in the session store so that they can be taken back."""

from __future__ import annotations

import secrets
import time

from pydantic import BaseModel

from services.gateway.auth import Share, new_share_id, sign_share
from services.gateway.errors import ConflictError
from shared.session.port import SessionStore

KEY_PLACE = "share-key"
KEY_TTL_S = 10 * 365 * 86_400.0
MAX_PER_STREAM = 64
CHECKED_S = 1.0  # a link that was taken back is worth nothing after so long


class ShareView(BaseModel):
    """One link. ``token`` is told once, when it is made."""

    id: str
    stream: str
    until: int
    token: str | None = None
    path: str | None = None


class Shares:
    """The links of all streams. ``key`` signs them: one for all gateways, made by the first that needs it."""

    def __init__(self, store: SessionStore) -> None:
        self._store = store
        self._key: bytes | None = None
        self._checked: dict[str, tuple[float, str | None]] = {}

    async def key(self) -> bytes:
        """The signing key."""
        if self._key is None:
            await self._store.put_note(KEY_PLACE, secrets.token_bytes(32), KEY_TTL_S, if_absent=True)
            kept = await self._store.get_note(KEY_PLACE)
            self._key = bytes(kept)
        return self._key

    async def make(self, stream: str, tenant: str, lasts_s: float) -> ShareView:
        """A new link. Raises ConflictError."""
        if len(await self._store.notes(_place(stream, ""))) >= MAX_PER_STREAM:
            raise ConflictError(f"stream {stream} has {MAX_PER_STREAM} share links: take one back first")
        share = Share(new_share_id(), stream, int(time.time() + lasts_s))
        await self._store.put_note(_place(stream, share.id), {"tenant": tenant, "until": share.until}, lasts_s)
        token = sign_share(share, await self.key())
        return ShareView(
            id=share.id, stream=stream, until=share.until, token=token, path=f"/?stream={stream}#token={token}"
        )

    async def of(self, stream: str) -> list[ShareView]:
        """The links of a stream, without their tokens."""
        found: list[ShareView] = []
        for place in await self._store.notes(_place(stream, "")):
            kept = await self._store.get_note(place)
            if kept is not None:
                found.append(ShareView(id=place.rpartition(":")[2], stream=stream, until=kept["until"]))
        return found

    async def revoke(self, stream: str, share: str) -> bool:
        """Take one back; whether there was one."""
        self._checked.pop(share, None)
        return await self._store.drop_note(_place(stream, share))

    async def forget(self, stream: str) -> None:
        """A new stream of this id begins: links to the one before do not show it."""
        for place in await self._store.notes(_place(stream, "")):
            await self._store.drop_note(place)
        self._checked.clear()

    async def tenant_of(self, share: Share) -> str | None:
        """Whose stream it is, or None when the link was taken back. Asked of the store once a second at most."""
        now = time.monotonic()
        at, tenant = self._checked.get(share.id, (float("-inf"), None))
        if now - at >= CHECKED_S:
            kept = await self._store.get_note(_place(share.stream, share.id))
            tenant = kept["tenant"] if kept is not None else None
            if len(self._checked) > 4096:
                self._checked.clear()
            self._checked[share.id] = (now, tenant)
        return tenant


def _place(stream: str, share: str) -> str:
    return f"share:{stream}:{share}"
