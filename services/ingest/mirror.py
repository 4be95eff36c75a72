"""What a successor of this process needs to know of a stream, in the session store."""

from __future__ import annotations

import logging

from services.ingest.audio import AudioBatcher
from shared.contracts.events import SourceTotals
from shared.session.port import SessionStore, StoreError
from shared.session.state import Owner

log = logging.getLogger(__name__)


class Mirror:
    """One stream's. A store that is away costs a warning, no picture."""

    def __init__(self, stream: str, store: SessionStore) -> None:
        self._stream, self._store = stream, store

    async def read(self) -> tuple[SourceTotals | None, int, int, int | None]:
        """What a predecessor of this process had done of the stream: (totals, closed chunks, audio parts, last dts)."""
        try:
            session = await self._store.get(self._stream)
            mirror = (session or {}).get("source")
            if not isinstance(mirror, dict):
                return None, 0, 0, None
            _, closed, _ = await self._store.ledger(self._stream)
            totals = SourceTotals.model_validate(mirror["totals"])
            return totals, closed, int(mirror["audio_parts"]), mirror["audio_dts"]
        except StoreError as error:
            log.warning("stream %s starts without its mirror: %s", self._stream, error)
            return None, 0, 0, None

    async def write(self, totals: SourceTotals, audio: AudioBatcher | None) -> None:
        """What has been done until now."""
        mirror = {
            "totals": totals.model_dump(),
            "audio_parts": audio.parts if audio is not None else 0,
            "audio_dts": audio.last_dts if audio is not None else None,
        }
        try:
            await self._store.put(self._stream, Owner.INGEST, {"source": mirror})
        except StoreError as error:
            log.warning("stream %s: its totals were not mirrored: %s", self._stream, error)
