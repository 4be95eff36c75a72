"""A stream goes on on another pipeline, pixel for pixel. Acts; what may move where is :mod:`placement`'s.

Cut over at a chunk boundary. The target takes the stream in a new epoch and lets its chunks wait; ingest numbers chunks in the
new epoch from the next frame block on; the old pipeline finishes what was numbered before, through decode; its state is
copied; then the target lets the chunks come. Ingest and egress stay, chunk numbers go on.

Whatever fails before that last step, the stream stays where it was: the old workers have kept the chunks of the new epoch,
and go on with them in it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from dataclasses import dataclass

from services.scheduler.core import PipelineCore
from services.scheduler.desk import StreamDesk
from services.scheduler.fleet import Fleet, Pipeline
from services.scheduler.messenger import Messenger, RefusedError, all_of
from services.scheduler.moves import new_move
from services.scheduler.records import Phase, StreamRecord
from services.scheduler.settings import Settings
from services.scheduler.stream_queue import StreamQueue
from shared.clock import Clock
from shared.contracts.events import EventKind
from shared.contracts.moving import BlockRange, CutOver, ExportState, ImportState
from shared.session.port import SessionStore, StoreError
from shared.session.state import Owner

log = logging.getLogger(__name__)

POLL_S = 0.004
STATE_S = 10.0  # one export or import
EGRESS_POLL_S = 0.25
EGRESS_S = 60.0


@dataclass(frozen=True, slots=True)
class Share:
    """What one old worker has that one new worker needs."""

    source: str
    target: str
    blocks: range
    encode: bool
    decode: bool


def shares(old: Pipeline, new: Pipeline) -> Iterator[Share]:
    """Every piece of a stream's state once, from who has it to who needs it. Encode is the first worker's."""
    for k, source in enumerate(old.workers):
        for j, target in enumerate(new.workers):
            blocks = range(max(old.blocks[k].start, new.blocks[j].start), min(old.blocks[k].stop, new.blocks[j].stop))
            encode, decode = k == 0 and j == 0, k == old.decode_stage and j == new.decode_stage
            if len(blocks) or encode or decode:
                yield Share(source, target, blocks, encode, decode)


class Migrator:
    """One per scheduler. ``opening`` keeps a pipeline's blocks from changing hands meanwhile."""

    def __init__(
        self,
        settings: Settings,
        clock: Clock,
        store: SessionStore,
        fleet: Fleet,
        desk: StreamDesk,
        messenger: Messenger,
    ) -> None:
        self._settings, self._clock, self._store = settings, clock, store
        self._fleet, self._desk, self._messenger = fleet, desk, messenger
        self._tasks: set[asyncio.Task[None]] = set()
        self._begun: dict[str, int] = {}  # pipeline → its generation that a move, and no batch, began

    async def migrate(self, record: StreamRecord, target: Pipeline, command: str = "") -> None:
        """Move a running stream. Raises RefusedError when it stays where it is, with the reason; migrated is told else."""
        async with record.changing, self._desk.opening(target.name):
            source, queue = self._source(record, target)
            former, epoch = record.epoch, record.epoch + 1
            begun = self._clock.monotonic()
            try:
                await all_of(
                    *(
                        self._messenger.take("worker", record, worker, epoch=epoch, pipeline=target.name, hold=True)
                        for worker in target.workers
                    )
                )
            except RefusedError:
                await self._leave(record, target, epoch)
                raise
            try:
                generation = await self._begin(target)
                async with asyncio.timeout(self._settings.migrate_timeout_s):
                    first = await self._change_epoch(record, queue, epoch)
                    await self._drained(record, queue, first)
                await self._copy(record, queue, source, target, former, epoch)
                self._still_running(record)
                if self._desk.core_of(target).generation != generation:
                    raise RefusedError(f"pipeline {target.name} was rebuilt meanwhile")
            except Exception as error:
                why = str(error) or f"what was under way was not done in {self._settings.migrate_timeout_s:g} s"
                log.warning("stream %s stays on pipeline %s: %s", record.stream, source.name, why)
                await self._leave(record, target, epoch)
                await self._stay(record, queue, source, epoch)
                raise RefusedError(f"stream {record.stream} stays on pipeline {source.name}: {why}", 5.0) from error
            finally:
                queue.flush = False
            await self._cut_over(record, queue, source, target, former)
        took = self._clock.monotonic() - begun
        reason = f"from pipeline {source.name} to {target.name}, in {took * 1000:.0f} ms"
        log.info("stream %s went %s", record.stream, reason)
        await self._desk.tell(record.stream, EventKind.MIGRATED, reason=reason, command=command, chunk=first)
        self._desk.pump()

    def _source(self, record: StreamRecord, target: Pipeline) -> tuple[Pipeline, StreamQueue]:
        self._still_running(record)
        if record.pipeline == target.name:
            raise RefusedError(f"stream {record.stream} is on pipeline {target.name} already")
        source = next((p for p in self._fleet.pipelines(usable=False) if p.name == record.pipeline), None)
        core = self._desk.cores.get(record.pipeline)
        queue = core.streams.get(record.stream) if core is not None else None
        if source is None or queue is None or len(source.blocks) != source.stages:
            raise RefusedError(f"pipeline {record.pipeline} is not whole: what it holds cannot be copied now", 2.0)
        if len(target.blocks) != target.stages:
            raise RefusedError(f"pipeline {target.name} is not complete yet", 2.0)
        return source, queue

    async def _begin(self, target: Pipeline) -> int:
        """The target's generation. One that begins with a batch empties every slot: this one begins before, and keeps them."""
        core = self._desk.core_of(target)
        if core.next_seq == 0 and self._begun.get(target.name) != core.generation:
            core.holding = True
            try:
                move = new_move()
                await all_of(*(self._begin_one(core, target, stage, move) for stage in range(target.stages)))
                self._begun[target.name] = core.generation
            finally:
                core.holding = False
        return core.generation

    async def _begin_one(self, core: PipelineCore, target: Pipeline, stage: int, move: str) -> None:
        request = CutOver(
            instance=target.workers[stage],
            pipeline=target.name,
            move=move,
            term=core.term,
            generation=core.generation,
            blocks=BlockRange.of(target.blocks[stage]),
            stage=stage,
            stages=target.stages,
        )
        await self._desk.moves.ask(request, STATE_S)

    async def _change_epoch(self, record: StreamRecord, queue: StreamQueue, epoch: int) -> int:
        """Chunks carry the new epoch from a frame block on; returns the first that does."""
        # Known first: motion looks here when it meets the epoch, and egress is told last of all.
        await self._store.put(record.stream, Owner.SCHEDULER, {"assignment": {**record.assignment(), "epoch": epoch}})
        record.epoch = epoch
        start = queue.waiting[0].stamp.chunk if queue.waiting else queue.gate.newest + 1
        length = queue.settings.frames_per_block
        await self._messenger.take("ingest", record, record.ingest, block_chunks=length, block_start=start)
        return record.epoch_from

    async def _drained(self, record: StreamRecord, queue: StreamQueue, first: int) -> None:
        """Until everything numbered before ``first`` is through the stages."""
        queue.flush = True  # live: a shorter frame block is better than waiting
        self._desk.pump()
        asked = self._clock.monotonic()
        while not (queue.idle and (queue.gate.newest >= first - 1 or queue.ended)):
            await self._clock.sleep(POLL_S)
            self._still_running(record)
            # What was skipped, dropped or lost on its way never comes here: its verdict says that it is done with.
            if queue.idle and self._clock.monotonic() - asked >= EGRESS_POLL_S:
                asked = self._clock.monotonic()
                _, _, through = await self._store.ledger(record.stream)
                if through >= first and queue.idle:
                    return

    async def _copy(
        self, record: StreamRecord, queue: StreamQueue, source: Pipeline, target: Pipeline, former: int, epoch: int
    ) -> None:
        await all_of(*(self._copy_share(record, queue, share, former, epoch) for share in shares(source, target)))

    async def _copy_share(
        self, record: StreamRecord, queue: StreamQueue, share: Share, former: int, epoch: int
    ) -> None:
        blocks = BlockRange.of(share.blocks) if len(share.blocks) else None
        until = self._clock.monotonic() + STATE_S
        while True:
            request = ExportState(
                instance=share.source,
                stream=record.stream,
                epoch=former,
                move=new_move(),
                blocks=blocks,
                encode=share.encode,
                decode=share.decode,
            )
            exported = await self._desk.moves.ask(request, STATE_S)
            # What the last stage finished may not have reached decode when this was asked.
            if not share.decode or exported.decoded >= queue.entered:
                break
            if self._clock.monotonic() > until:
                raise RefusedError(f"{share.source} has decoded chunk {exported.decoded}, not {queue.entered}")
            await self._clock.sleep(5 * POLL_S)
        if exported.state is None:
            raise RefusedError(f"{share.source} exported nothing of stream {record.stream}")
        taken = ImportState(
            instance=share.target,
            stream=record.stream,
            epoch=epoch,
            move=new_move(),
            state=exported.state,
            encoded=exported.encoded,
            decoded=exported.decoded,
        )
        await self._desk.moves.ask(taken, STATE_S)

    async def _cut_over(
        self, record: StreamRecord, queue: StreamQueue, source: Pipeline, target: Pipeline, former: int
    ) -> None:
        """No way back from here on: what fails now fails the stream."""
        old, first_epoch = self._desk.core_of(source), record.epoch
        old.remove(record.stream)  # nothing of it waits there
        queue.adopt(first_epoch)
        record.pipeline, record.workers = target.name, target.workers
        self._desk.core_of(target).add(queue)
        for worker in source.workers:
            await self._messenger.leave("worker", record, worker, False, None, epoch=former)
        await self._messenger.take("motion", record, record.motion, wait=False)
        try:
            await all_of(*(self._messenger.take("worker", record, worker) for worker in target.workers))
            await self._store.put(record.stream, Owner.SCHEDULER, {"assignment": record.assignment()})
            await self._store.put(record.stream, Owner.SCHEDULER, {"epoch": record.epoch})
        except (RefusedError, StoreError) as error:
            await self._desk.fail(record.stream, f"it could not go on on pipeline {target.name}: {error}")
            raise RefusedError(str(error)) from error
        task = asyncio.create_task(self._tell_egress(record))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _stay(self, record: StreamRecord, queue: StreamQueue, source: Pipeline, epoch: int) -> None:
        """Back to as it was, in the new epoch if ingest has been told of it."""
        if record.epoch != epoch or record.phase is Phase.ENDED or record.failure is not None:
            return
        queue.adopt(epoch, since=queue.since or queue.epoch)
        try:
            # Ingest again: it may not have heard, and answers as it did when it has.
            await self._messenger.take("ingest", record, record.ingest)
            await all_of(*(self._messenger.take("worker", record, worker, keep=True) for worker in source.workers))
            await self._store.put(record.stream, Owner.SCHEDULER, {"assignment": record.assignment()})
        except (RefusedError, StoreError) as error:
            await self._desk.fail(record.stream, f"it could neither move nor stay: {error}")
        self._desk.pump()

    async def _leave(self, record: StreamRecord, target: Pipeline, epoch: int) -> None:
        for worker in target.workers:
            await self._messenger.leave("worker", record, worker, False, None, epoch=epoch)

    async def _tell_egress(self, record: StreamRecord) -> None:
        """Egress turns away what is of an older epoch: it learns of the new one when all that has been shown."""
        epoch, first, until = record.epoch, record.epoch_from, self._clock.monotonic() + EGRESS_S
        while self._clock.monotonic() < until and record.phase is Phase.RUNNING and record.epoch == epoch:
            await self._clock.sleep(EGRESS_POLL_S)
            _, _, through = await self._store.ledger(record.stream)
            if through >= first:
                await self._messenger.take("egress", record, record.egress, wait=False, epoch=epoch)
                return

    def _still_running(self, record: StreamRecord) -> None:
        if record.phase is not Phase.RUNNING:
            raise RefusedError(record.failure or f"stream {record.stream} is not running")

    async def close(self) -> None:
        """Stop what is under way."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
