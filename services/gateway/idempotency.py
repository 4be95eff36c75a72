"""The same key and body give the same answer: a client that saw no answer may ask again without a second stream."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Awaitable, Callable
from typing import Annotated, Any

from fastapi import Header

from services.gateway.errors import ConflictError, InvalidError
from shared.session.port import SessionStore

KEPT_S = 3600.0
PENDING_S = 120.0  # longer than any answer takes; after it the gateway that was asked is gone

IdempotencyKey = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        pattern=r"^[\x21-\x7e]{1,128}$",
        description="The same key and body within an hour give the same answer and no second stream; another body is refused.",
    ),
]


class PendingError(ConflictError):
    """The first request of this key is still being answered."""

    def more(self) -> dict[str, Any]:
        """It will not take long."""
        return {"retry_after_s": 1.0}


class Idempotency:
    """Answers by (tenant, key), in the session store. Refusals are not kept: the same request may be accepted later."""

    def __init__(self, store: SessionStore) -> None:
        self._store = store

    async def once(
        self, tenant: str, key: str | None, body: dict[str, Any], make: Callable[[], Awaitable[dict[str, Any]]]
    ) -> dict[str, Any]:
        """``make``'s answer, or the one it gave before. Raises InvalidError for another body, PendingError."""
        if key is None:
            return await make()
        place = f"idempotency:{tenant}:{hashlib.sha256(key.encode()).hexdigest()}"
        print_ = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
        if not await self._store.put_note(place, {"body": print_}, PENDING_S, if_absent=True):
            kept = await self._store.get_note(place) or {}
            if kept.get("body", print_) != print_:
                raise InvalidError("this Idempotency-Key came with another body: use a new key for a new request")
            answer = kept.get("answer")
            if answer is None:
                raise PendingError("the first request of this Idempotency-Key is still being answered")
            return answer
        try:
            answer = await make()
        except BaseException:
            await self._store.drop_note(place)
            raise
        await self._store.put_note(place, {"body": print_, "answer": answer}, KEPT_S)
        return answer
