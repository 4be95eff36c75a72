"""The ledger's way into the session store: one transaction per chunk, retried until the store takes it."""

from __future__ import annotations

import logging
from collections import deque

from services.egress.ledger import ChunkVerdict, StreamLedger
from shared.contracts.events import StreamStats
from shared.session.port import NoSuchStreamError, SessionStore, StoreError
from shared.session.state import IllegalMoveError, Owner, StreamState

log = logging.getLogger(__name__)

# Verdicts that may wait for a store that does not answer; beyond it the oldest are only in memory.
MAX_WAITING = 10_000


class Accounts:
    """Writes one stream's verdicts. The store is asked first: a verdict it has already is taken back here."""

    def __init__(self, stream: str, ledger: StreamLedger, store: SessionStore) -> None:
        self._stream, self._ledger, self._store = stream, ledger, store
        self._waiting: deque[ChunkVerdict] = deque(maxlen=MAX_WAITING)
        self._complained = False
        self._unsure = False
        self._drops: tuple[int, dict[str, int]] | None = None  # ingest's, as the store has them

    def add(self, verdicts: list[ChunkVerdict]) -> None:
        """Verdicts to be written."""
        self._waiting.extend(verdicts)

    async def write(self) -> int:
        """Write what waits; how many verdicts left the queue. A store that is away keeps them waiting."""
        written = 0
        try:
            while self._waiting:
                verdict = self._waiting[0]
                # From here until the answer nobody knows whether the store has the verdict, whatever ends the wait.
                asked_before, self._unsure = self._unsure, True
                first = await self._store.close_chunk(self._stream, verdict.chunk, verdict.counts())
                # After an answer that got lost, "closed already" speaks of this very verdict.
                if not first and not asked_before:
                    self._ledger.retract(verdict)
                self._unsure = False
                if self._waiting and self._waiting[0] is verdict:
                    self._waiting.popleft()
                written += 1
            # Also while no chunk is closed, as in a pause: a successor takes what the store has for counted.
            drops = self._ledger.ingest_drops()
            if written or drops != self._drops:
                await self._store.put_ledger_frames_in(self._stream, *drops)
                self._drops = drops
            self._complained = False
        except StoreError as error:
            if not self._complained:
                log.warning("stream %s: the ledger waits for the session store: %s", self._stream, error)
            self._complained = True
            written += len(self._waiting)  # credits must flow all the same
        return written

    async def finish(self, stats: StreamStats) -> None:
        """Write what still waits, and the stream's measures."""
        await self.write()
        try:
            await self._store.put_ledger_frames_in(self._stream, *self._ledger.ingest_drops())
            last = {"last_chunk": self._ledger.through - 1, "stats": stats.model_dump()}
            await self._store.put(self._stream, Owner.EGRESS, last)
        except StoreError as error:
            log.warning("stream %s: its last figures were not stored: %s", self._stream, error)

    async def move(self, *, failed: bool) -> None:
        """The session's state: stopping, then stopped or failed. The scheduler may have been first."""
        for state in (StreamState.STOPPING, StreamState.FAILED if failed else StreamState.STOPPED):
            try:
                await self._store.move(self._stream, state)
            except (IllegalMoveError, NoSuchStreamError) as error:
                log.debug("stream %s: %s", self._stream, error)
            except StoreError as error:
                log.warning("stream %s: its state was not stored: %s", self._stream, error)
