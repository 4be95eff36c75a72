"""Streams that stay paused are set aside: their slots and caches go to host memory, and back before a chunk enters again.

``decide`` is pure: which streams have been paused long enough, and have nothing under way. The rest asks the workers.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

from services.scheduler.core import PipelineCore
from services.scheduler.messenger import RefusedError
from services.scheduler.moves import Moves, new_move
from services.scheduler.records import Phase, StreamRecord
from shared.contracts.moving import SuspendStream

log = logging.getLogger(__name__)

ANSWER_S = 10.0
RETRY_S = 30.0
"""How long after a worker refused to set a stream aside it is asked again."""


class Suspending:
    """Sets paused streams aside and brings them back. One per scheduler."""

    def __init__(self, moves: Moves, after_s: float) -> None:
        self._moves, self._after_s = moves, after_s
        self._since: dict[str, float] = {}

    def due(self, records: Iterable[StreamRecord], cores: dict[str, PipelineCore], now: float) -> list[StreamRecord]:
        """The streams to set aside now, each told once. ``now`` in seconds, monotonic. Negative ``after_s``: never any."""
        found: list[StreamRecord] = []
        paused: set[str] = set()
        for record in records:
            if record.phase is not Phase.RUNNING or not record.paused:
                continue
            paused.add(record.stream)
            if record.suspended or record.changing.locked():
                continue
            since = self._since.setdefault(record.stream, now)
            if self._after_s >= 0 and now - since >= self._after_s and is_still(record, cores):
                self._since[record.stream] = now + RETRY_S
                found.append(record)
        for stream in self._since.keys() - paused:
            del self._since[stream]
        return found

    async def set_aside(self, record: StreamRecord, cores: dict[str, PipelineCore]) -> None:
        """Every worker of the stream moves its state to the host; where one cannot, all come back with the stream."""
        async with record.changing:
            if record.phase is not Phase.RUNNING or not record.paused or not is_still(record, cores):
                return
            record.suspended = True  # even where it fails half-way: then all of it must be brought back
            try:
                host = 0
                for worker in record.workers:
                    host += (await self._moves.ask(self._request(record, worker, True), ANSWER_S)).host_bytes
            except RefusedError as error:
                log.warning("stream %s could not be set aside: %s", record.stream, error)
                return
            log.info("stream %s is set aside: %.1f MiB on the host", record.stream, host / 2**20)

    async def bring_back(self, record: StreamRecord) -> None:
        """Before anything of the stream enters again. Raises RefusedError where others have taken its room meanwhile."""
        if not record.suspended:
            return
        for worker in record.workers:
            await self._moves.ask(self._request(record, worker, False), ANSWER_S)
        record.suspended = False

    def _request(self, record: StreamRecord, worker: str, suspended: bool) -> SuspendStream:
        return SuspendStream(
            instance=worker, stream=record.stream, epoch=record.epoch, move=new_move(), suspended=suspended
        )


def is_still(record: StreamRecord, cores: dict[str, PipelineCore]) -> bool:
    """Whether no step of the stream is under way or waits for its turn."""
    core = cores.get(record.pipeline)
    queue = core.streams.get(record.stream) if core is not None else None
    if core is None or queue is None or queue.later:
        return False
    return not any(work.stream == record.stream for flight in core.in_flight.values() for work in flight.works)
