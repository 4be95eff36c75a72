"""Changes to running streams: accepted or refused at once, bound by the next block, kept for whoever shows them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from services.scheduler.core import PipelineCore
from services.scheduler.messenger import Messenger, RefusedError, credits_for, tell_refused
from services.scheduler.placing import check_settings
from services.scheduler.prompting import Prompting
from services.scheduler.records import Phase, StreamRecord
from services.scheduler.resizing import Resizing
from services.scheduler.stream_queue import Change, StreamQueue, StreamSettings
from services.scheduler.suspending import Suspending
from services.scheduler.tiering import Tiering
from shared.contracts.commands import StreamPatch, UpdateStream
from shared.contracts.events import EventKind
from shared.session.port import SessionStore
from shared.session.state import Owner

RETRY_RECOVERING_S = 2.0


class Changing:
    """Carries out updates and pauses. ``pump`` asks the service to schedule soon."""

    def __init__(
        self,
        store: SessionStore,
        messenger: Messenger,
        prompting: Prompting,
        tiering: Tiering,
        suspending: Suspending,
        records: Mapping[str, StreamRecord],
        cores: Mapping[str, PipelineCore],
        pump: Callable[[], None],
        resizing: Resizing,
    ) -> None:
        self._store, self._messenger, self._prompting, self._tiering = store, messenger, prompting, tiering
        self._suspending, self._resizing = suspending, resizing
        self._records, self._cores, self._pump = records, cores, pump

    async def update(self, command: UpdateStream) -> None:
        """Change a running stream. Answers accepted or refused; applied follows with the chunk it took effect at."""
        record = self._records.get(command.stream)
        if record is None or record.phase is not Phase.RUNNING:
            recovering = record is not None and record.phase is Phase.RECOVERING
            reason = f"stream {command.stream} is {'recovering: try again' if recovering else 'not running'}"
            retry_s = RETRY_RECOVERING_S if recovering else 0.0
            await self._messenger.tell(
                command.stream, EventKind.REFUSED, reason=reason, command=command.command, retry_after_s=retry_s
            )
            return
        async with record.changing:  # one change at a time: each starts from what the one before left
            await self._change(record, command)

    async def _change(self, record: StreamRecord, command: UpdateStream) -> None:
        patch: StreamPatch = command.patch
        try:
            queue = self.queue_of(record)
            if patch.paused is not None:
                await self._pause(record, queue, command.command, patch.paused)
                return
            if patch.width is not None and patch.height is not None:
                await self._resizing.resize(record, queue, command.command, patch.width, patch.height)
                return
            longest = max(patch.frames_per_block or 1, patch.max_frames_per_block or 1)
            check_settings(queue.model, patch.steps, longest, patch.noise, queue.from_text)
            await self._make_room(record, longest)
            self._tiering.check_rate(record, patch.fps, queue.from_text)
            version = await self._prepare(record, patch)
            await self._refresh(record, patch.skip_similar)
            queue = self.queue_of(record)  # preparing took a while
        except RefusedError as error:
            await tell_refused(self._messenger, record.stream, command.command, error)
            return
        if patch.noise is not None:
            record.noise, record.noise_version = patch.noise, record.noise_version + 1
        now = queue.settings
        steps, frames_per_block = self._tiering.asked(record, patch, now)
        settings = StreamSettings(
            steps=steps,
            seed=now.seed if patch.seed is None else patch.seed,
            prompt_version=version or now.prompt_version,
            frames_per_block=frames_per_block,
            max_frames_per_block=patch.max_frames_per_block or now.max_frames_per_block,
        )
        await self.keep_settings(record, settings)  # who is told "accepted" may look at once
        await self._messenger.tell(
            record.stream, EventKind.ACCEPTED, command=command.command, version=settings.prompt_version
        )
        settings = self._tiering.as_now(record, settings)  # telling took a while: the ladder may have moved on
        noise_version = 0 if patch.noise is None else record.noise_version
        queue.change(
            command.command, Change(settings, noise_version, patch.blend_chunks, patch.recache, reset=patch.reset)
        )
        if patch.noise is not None:
            # Last of all: the first chunk that is estimated with it must find the change waiting here.
            await self._store.put(record.stream, Owner.SCHEDULER, {"assignment": record.assignment()})
            await self._messenger.take("motion", record, record.motion, wait=False)
        self._pump()
        await self._tiering.settle(record, patch)

    async def _prepare(self, record: StreamRecord, patch: StreamPatch) -> int | None:
        """The new prompt's version, None when it stays as it is. Raises RefusedError."""
        if patch.prompt is None and not patch.prompts:
            return None
        return await self._prompting.prepare(record, patch.prompt or "", patch.prompts)

    async def _pause(self, record: StreamRecord, queue: StreamQueue, command: str, paused: bool) -> None:
        """Ingest tells applied, with the chunk. Raises RefusedError when a suspended stream's state does not come back."""
        if not paused:
            await self._suspending.bring_back(record)
        record.paused = queue.paused = paused
        await self.keep_settings(record, queue.settings)
        await self._messenger.tell(record.stream, EventKind.ACCEPTED, command=command)
        await self._messenger.pause(record, command, paused)
        self._pump()

    async def _make_room(self, record: StreamRecord, frames_per_block: int) -> None:
        """Longer frame blocks need more chunks under way: give ingest the credits. Raises RefusedError."""
        before, length = credits_for(record), record.frames_per_block
        record.frames_per_block = max(length, frames_per_block)
        if credits_for(record) > before:
            try:
                await self._messenger.take("ingest", record, record.ingest)
            except RefusedError:
                record.frames_per_block = length  # asked for again, it has to be asked of ingest again
                raise

    async def _refresh(self, record: StreamRecord, skip_similar: float | None) -> None:
        """Ingest skips nothing until a change is seen; or learns of another threshold."""
        if not record.skip_similar and skip_similar is None:
            return
        record.skip_similar = record.skip_similar if skip_similar is None else skip_similar
        record.refreshes += 1
        self.queue_of(record).skips = record.skip_similar > 0
        await self._messenger.take("ingest", record, record.ingest)

    async def keep_settings(self, record: StreamRecord, settings: StreamSettings) -> None:
        """What the stream runs with now, for whoever shows it."""
        kept = {
            "steps": settings.steps,
            "seed": settings.seed,
            "frames_per_block": settings.frames_per_block,
            "noise": record.noise,
            "skip_similar": record.skip_similar,
            "fps": record.fps_cap or record.spec.fps,
            "paused": record.paused,
        }
        await self._store.put(record.stream, Owner.SCHEDULER, {"settings": kept})

    def queue_of(self, record: StreamRecord) -> StreamQueue:
        """The stream's queue. Raises RefusedError once it has ended."""
        core = self._cores.get(record.pipeline)
        queue = core.streams.get(record.stream) if core is not None else None
        if queue is None:
            raise RefusedError(f"stream {record.stream} has ended meanwhile")
        return queue
