"""The ladder in the service: which tier each stream runs with, carried out and told.

A tier is a change like a user's: steps and T are bound with the next block that enters, and told with its first chunk; a
rate goes to ingest. Lossless streams have no ladder: their pixels must not depend on the load.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from services.scheduler.admitting import Admitting, demand_of, tier_of
from services.scheduler.core import PipelineCore
from services.scheduler.ladder import Ladder, TierChange, Wish
from services.scheduler.messenger import Messenger, RefusedError
from services.scheduler.pricing import Demand
from services.scheduler.records import Phase, StreamRecord
from services.scheduler.stream_queue import Applied, Change, StreamQueue, StreamSettings
from shared.clock import Clock
from shared.contracts.commands import Mode, NoSource, StreamPatch
from shared.contracts.events import ChunkClosed, ChunkStamp, EventKind
from shared.contracts.tiers import Quality
from shared.engine.plan.spec import ModelSpec
from shared.session.port import NoSuchStreamError, SessionStore
from shared.session.state import IllegalMoveError, Owner, StreamState

EVERY_S = 0.2  # how often the ladder is asked
COMMAND = "tier:"
# Not for want of time: the source, its user, or a fault.
NOT_MISSED = frozenset(
    {
        "ingest:behind",
        "ingest:paused",
        "ingest:stopped",
        "ingest:rate",
        "ingest:resized",
        "ingest:lost",
        "scheduler:pipeline_fault",
        "scheduler:resized",
        "egress:sink_full",
    }
)
FPS_WEIGHT = 0.3
FPS_CHUNKS = 4  # so many before a source's rate is believed
FPS_MOVED = 0.1  # a rate that differs by less is the same


@dataclass(slots=True)
class _Seen:
    """What was heard of a stream: its ledger's newest figures, and its source's rate."""

    closed: int = 0
    missed: int = 0
    captured_ns: int = 0
    chunks: int = 0
    fps: float = 0.0


class Tiering:
    """The ladders of all pipelines."""

    def __init__(
        self,
        store: SessionStore,
        messenger: Messenger,
        clock: Clock,
        admitting: Admitting,
        records: Mapping[str, StreamRecord],
        cores: Mapping[str, PipelineCore],
    ) -> None:
        self._store, self._messenger, self._clock = store, messenger, clock
        self._admitting, self._records, self._cores = admitting, records, cores
        self.ladders: dict[str, Ladder] = {}
        self._seen: dict[str, _Seen] = {}
        self._at: dict[str, str] = {}  # stream → the pipeline whose ladder it is on
        self._telling: dict[str, TierChange] = {}
        self._told = 0
        self._asked_s = float("-inf")

    # --- streams ------------------------------------------------------------------------------------------------------

    def begin(self, record: StreamRecord, model: ModelSpec) -> Demand:
        """A stream gets its queue. Returns the tier it begins with: what it was let in with."""
        asked = demand_of(record, model)
        record.wish = wish_of(record, asked)
        tier = record.demand or asked
        if record.spec.mode is Mode.LIVE:
            self._ladder(record.pipeline).join(record.stream, record.wish, tier)
            self._seen[record.stream] = _Seen()
            self._at[record.stream] = record.pipeline
        return tier

    def end(self, record: StreamRecord) -> None:
        """A stream has no queue any more."""
        self._seen.pop(record.stream, None)
        ladder = self.ladders.get(self._at.pop(record.stream, record.pipeline))
        if ladder is not None:
            ladder.leave(record.stream)

    def _follow(self) -> None:
        """Streams that have moved to another pipeline take their tier along, and their place in the books."""
        for stream, at in list(self._at.items()):
            record = self._records.get(stream)
            if record is None or record.pipeline == at or record.phase is not Phase.RUNNING or record.wish is None:
                continue
            former = self.ladders.get(at)
            tier = former.tier(stream) if former is not None else None
            if former is not None:
                former.leave(stream)
            if record.pipeline in self._admitting.admission.books:
                self._ladder(record.pipeline).join(stream, record.wish, tier)
                self._admitting.admission.move(stream, record.pipeline)
                self._at[stream] = record.pipeline

    async def settle(self, record: StreamRecord, patch: StreamPatch | None = None) -> None:
        """A stream has begun, or its user has changed what it asks for: what it gets of that is carried out and told."""
        ladder, wish = self.ladders.get(record.pipeline), record.wish
        tier = ladder.tier(record.stream) if ladder is not None else None
        if wish is None or tier is None or (patch is not None and tier_of(tier) == record.tier):
            return
        degraded = tier != wish.asked
        change = TierChange(record.stream, tier, degraded, "there is no room for more" if degraded else "")
        await self._keep(record, change)
        await self._pace(record, tier)
        if degraded:
            await self._tell(change)

    def asked(self, record: StreamRecord, patch: StreamPatch, now: StreamSettings) -> tuple[int, int]:
        """The user wishes for something else: the (steps, T) that the stream gets of it now."""
        wish = record.wish
        steps, frames = patch.steps or now.steps, patch.frames_per_block or now.frames_per_block
        if wish is None or (ladder := self.ladders.get(record.pipeline)) is None or ladder.tier(record.stream) is None:
            return steps, frames
        wanted = patched(wish, patch, record.spec.fps or record.fps_seen)
        if wanted == wish:
            return now.steps, now.frames_per_block
        record.wish = wanted
        self._admitting.admission.change(record.stream, wanted.asked)
        tier = ladder.ask(record.stream, wanted)
        return tier.steps, tier.frames_per_block

    def degraded(self, pipeline: str) -> bool:
        """Whether a stream on it runs with less than it asks for."""
        ladder = self.ladders.get(pipeline)
        return ladder is not None and ladder.degraded

    def resized(self, record: StreamRecord, model: ModelSpec) -> None:
        """The stream has the size of its record now: what it wishes for and is promised is that."""
        wish, ladder = record.wish, self.ladders.get(record.pipeline)
        if wish is None:
            return
        tokens = model.tokens(record.width, record.height)
        asked = replace(wish.asked, width=record.width, height=record.height, tokens=tokens)
        record.wish = replace(wish, asked=asked)
        self._admitting.resized(record, asked)
        if ladder is not None and ladder.tier(record.stream) is not None:
            ladder.ask(record.stream, record.wish)

    def check_rate(self, record: StreamRecord, fps: float | None, from_text: bool) -> None:
        """Take a user's new rate down, as a limit on what the source gives. Raises RefusedError where there can be none."""
        if fps is None:
            return
        if record.spec.mode is not Mode.LIVE or from_text:
            raise RefusedError("fps: only a live source can leave frames out; start a new stream at the other rate")
        source = record.spec.fps or record.fps_seen
        record.fps_cap = fps if not source or fps < source else 0.0

    def as_now(self, record: StreamRecord, settings: StreamSettings) -> StreamSettings:
        """The settings with the steps and T that the ladder has left the stream."""
        ladder = self.ladders.get(record.pipeline)
        tier = ladder.tier(record.stream) if ladder is not None else None
        if tier is None:
            return settings
        return replace(settings, steps=tier.steps, frames_per_block=tier.frames_per_block)

    # --- what was heard -----------------------------------------------------------------------------------------------

    def on_closed(self, message: ChunkClosed) -> None:
        """Verdicts of egress. Cumulative: what is lost comes with the next."""
        record, seen = self._records.get(message.stream), self._seen.get(message.stream)
        if record is None or seen is None:
            return
        totals = message.totals
        missed = totals.late + sum(n for name, n in totals.dropped.items() if name not in NOT_MISSED)
        closed = totals.closed - (
            totals.dropped_total - sum(n for k, n in totals.dropped.items() if k not in NOT_MISSED)
        )
        ladder = self.ladders.get(record.pipeline)
        if ladder is not None and closed > seen.closed and not record.paused:
            ladder.closed(record.stream, closed - seen.closed, max(0, missed - seen.missed), self._clock.monotonic())
        seen.closed, seen.missed = max(closed, seen.closed), max(missed, seen.missed)

    def on_chunk(self, stamp: ChunkStamp, model: ModelSpec) -> None:
        """A chunk came by: a source whose rate was not given shows it."""
        record, seen = self._records.get(stamp.stream), self._seen.get(stamp.stream)
        if record is None or seen is None or record.spec.fps or not stamp.frames or record.pace_fps:
            return
        newest = stamp.frames[-1].captured_ns
        passed_s, seen.captured_ns = (newest - seen.captured_ns) / 1e9, newest
        if seen.chunks == 0 or passed_s <= 0:
            seen.chunks += 1
            return
        fps = len(stamp.frames) / passed_s
        seen.fps = fps if seen.chunks == 1 else seen.fps + FPS_WEIGHT * (fps - seen.fps)
        seen.chunks += 1
        believed = record.fps_seen or (record.wish.asked.fps if record.wish is not None else 0.0)
        if seen.chunks > FPS_CHUNKS and abs(seen.fps - believed) > FPS_MOVED * believed:
            record.fps_seen = round(seen.fps, 1)
            self._is_as_fast_as(record, demand_of(record, model))

    def _is_as_fast_as(self, record: StreamRecord, measured: Demand) -> None:
        ladder, wish = self.ladders.get(record.pipeline), record.wish
        if ladder is None or wish is None or ladder.tier(record.stream) != wish.asked:
            return  # degraded: what it asks for is not what is measured
        asked = replace(wish.asked, fps=measured.fps, min_fps=measured.min_fps)
        record.wish = replace(wish, asked=asked)
        ladder.ask(record.stream, record.wish)
        self._admitting.admission.change(record.stream, asked)

    # --- deciding -----------------------------------------------------------------------------------------------------

    async def tick(self) -> None:
        """Ask the ladders, a few times a second, and carry out what they say."""
        now = self._clock.monotonic()
        if now - self._asked_s < EVERY_S:
            return
        self._asked_s = now
        self._admitting.follow()
        self._follow()
        for pipeline, ladder in self.ladders.items():
            self._price(pipeline, ladder)
            for change in ladder.decide(now):
                record = self._records.get(change.stream)
                if record is not None:
                    await self._carry_out(record, change)

    async def _carry_out(self, record: StreamRecord, change: TierChange) -> None:
        core = self._cores.get(record.pipeline)
        queue = core.streams.get(record.stream) if core is not None else None
        if queue is None or record.phase is not Phase.RUNNING:
            return
        self._bind(queue, change)
        await self._keep(record, change)
        await self._pace(record, change.tier)

    def _bind(self, queue: StreamQueue, change: TierChange) -> None:
        """The next block that enters has the tier's steps and T, and tells it."""
        self._told += 1
        command = f"{COMMAND}{self._told}"
        self._telling[command] = change
        tier = change.tier
        settings = replace(queue.settings, steps=tier.steps, frames_per_block=tier.frames_per_block)
        queue.change(command, Change(settings))
        queue.touch()

    async def applied(self, applied: Applied) -> bool:
        """Whether this was a tier's change; then it is told, with the chunk."""
        if not applied.command.startswith(COMMAND):
            return False
        change = self._telling.pop(applied.command, None)
        if change is not None:
            await self._tell(change, applied.chunk, applied.pts)
        return True

    async def _tell(self, change: TierChange, chunk: int = -1, pts: int = -1) -> None:
        await self._messenger.tell(
            change.stream,
            EventKind.TIER_CHANGED,
            reason=change.reason,
            chunk=chunk,
            pts=pts,
            tier=tier_of(change.tier),
        )

    async def _keep(self, record: StreamRecord, change: TierChange) -> None:
        """In the session: the tier, why, and whether the stream is degraded."""
        record.tier = tier_of(change.tier)
        reason = change.reason if change.degraded else ""
        kept = {"tier": tier_of(change.tier).model_dump(), "reason": reason}
        try:
            await self._store.put(record.stream, Owner.SCHEDULER, {"tier": kept})
            await self._store.move(record.stream, StreamState.DEGRADED if change.degraded else StreamState.LIVE)
        except (IllegalMoveError, NoSuchStreamError):
            return  # degraded already, or ending

    async def _pace(self, record: StreamRecord, tier: Demand) -> None:
        """Ingest takes as many frames as the tier has; all of them, or what its user allows, when that was asked for."""
        asked = record.wish.asked.fps if record.wish is not None else tier.fps
        fps = tier.fps if tier.fps < asked - 1e-9 else record.fps_cap
        if fps != record.pace_fps:
            record.pace_fps = fps
            record.pace_version += 1
            await self._messenger.pace(record)

    # --- inside -------------------------------------------------------------------------------------------------------

    def _ladder(self, pipeline: str) -> Ladder:
        ladder = self.ladders.get(pipeline)
        if ladder is None:
            book = self._admitting.admission.books[pipeline]
            ladder = self.ladders[pipeline] = Ladder(book.shape, book.costs)
        return ladder

    def _price(self, pipeline: str, ladder: Ladder) -> None:
        """The ladder prices what runs as admission prices what was promised."""
        book = self._admitting.admission.books.get(pipeline)
        if book is not None:
            ladder.book.shape, ladder.book.costs, ladder.book.neighbours = book.shape, book.costs, book.neighbours


def wish_of(record: StreamRecord, asked: Demand) -> Wish:
    """What a stream's spec wishes for. What has no source cannot leave frames out: it would be another video."""
    if isinstance(record.spec.source, NoSource):
        asked = replace(asked, min_fps=asked.fps)
    return Wish(asked, record.spec.quality, record.spec.max_frames_per_block or 0)


def patched(wish: Wish, patch: StreamPatch, source_fps: float = 0.0) -> Wish:
    """The wish with a user's changes; a bound that what is asked for passes moves along.

    ``source_fps`` is what the source gives (0: not known): nobody is priced for more than that.
    """
    before = wish.asked
    steps = patch.steps or before.steps
    frames = patch.frames_per_block or before.frames_per_block
    fps = patch.fps or before.fps
    if patch.fps and source_fps:
        fps = min(patch.fps, source_fps)
    asked = replace(
        before,
        steps=steps,
        frames_per_block=frames,
        fps=fps,
        min_steps=min(steps, patch.min_steps or before.min_steps),
        min_fps=min(fps, patch.min_fps or before.min_fps),
    )
    longest = patch.max_frames_per_block or wish.max_frames_per_block
    quality: Quality = patch.quality or wish.quality
    return Wish(asked, quality, max(longest, frames) if longest else 0)
