"""Assignments: which streams are on this worker, their prompts, and what they were told.

The event loop checks epochs and answers; the device thread opens, closes and computes.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from services.worker.core import Rank, Role
from services.worker.device_thread import DeviceThread, QueueFullError
from services.worker.embeddings import from_store, to_store
from services.worker.holding import ChunkGate
from services.worker.runtime import Runtime
from shared.bus.port import Handler, Received, Subscription
from shared.contracts import subjects
from shared.contracts.commands import LeaveStream, Mode, PreparePrompt, ScaleLoras, TakeStream, TextEncode, TextEncoded
from shared.contracts.events import ChunkStamp, PromptReady, StreamTaken
from shared.contracts.moving import Move
from shared.contracts.order import OrderGate
from shared.engine.plan.prompts import digest, mix_digest
from shared.lifecycle import Context

log = logging.getLogger(__name__)

LIVE_TTL_S = 30.0
LOSSLESS_TTL_S = 900.0
PAUSED_TTL_S = 86400.0
"""Of a lossless stream's latents before step 0: a block of several chunks waits out a pause."""
CLOSE_DELAY_S = 2.0


@dataclass(slots=True)
class Placed:
    """A stream on this worker."""

    take: TakeStream
    chunks: ChunkGate
    encode_gate: OrderGate = field(default_factory=OrderGate)
    decode_gate: OrderGate = field(default_factory=OrderGate)
    decoding: asyncio.Lock = field(default_factory=asyncio.Lock)  # from the gate until it waits for the device
    subscriptions: list[Subscription] = field(default_factory=list)
    suspended: bool = False  # its state is on the host

    @property
    def ttl_s(self) -> float:
        """How long a reference of this stream may wait for its reader."""
        return LIVE_TTL_S if self.take.spec.mode is Mode.LIVE else LOSSLESS_TTL_S

    @property
    def waiting_ttl_s(self) -> float:
        """The same of latents that wait for the scheduler."""
        return LIVE_TTL_S if self.take.spec.mode is Mode.LIVE else PAUSED_TTL_S


class Assignments:
    """The streams of one worker. ``on_chunk`` and ``on_denoised`` are subscribed per stream, by role."""

    def __init__(
        self, context: Context, runtime: Runtime, device: DeviceThread, on_chunk: Handler, on_denoised: Handler
    ) -> None:
        self._context = context
        self._bus = context.bus
        self._runtime = runtime
        self._device = device
        self._settings = runtime.settings
        self._on_chunk, self._on_denoised = on_chunk, on_denoised
        self.streams: dict[str, Placed] = {}
        self._taking: set[str] = set()  # being opened: a close that comes late leaves them alone
        self.on_move: Callable[[Move], None] = lambda _: None

    def find(self, stamp: ChunkStamp) -> Placed | None:
        """The stream of a chunk, if it is here in this epoch, or has kept its state since (rule 6)."""
        placed = self.streams.get(stamp.stream)
        if placed is None or not placed.chunks.takes(stamp.epoch):
            return None
        placed.suspended = False  # what it runs brings it back
        return placed

    def check_room(self) -> None:
        """Raises RuntimeError when no stream more may be active here: suspended ones do not count."""
        active = sum(not placed.suspended for placed in self.streams.values())
        if active >= self._settings.max_streams:
            raise RuntimeError(f"{self._context.instance} holds {active} streams already")

    async def on_assign(self, received: Received) -> None:
        """Take, leave, prepare; what is meant for another instance is ignored."""
        message: TakeStream | LeaveStream | PreparePrompt | ScaleLoras | Move = received.message
        if message.instance != self._context.instance:
            return
        if isinstance(message, TakeStream):
            await self._take(message)
        elif isinstance(message, LeaveStream):
            await self._leave(message.stream, message.epoch)
        elif isinstance(message, ScaleLoras):
            await self._scale_loras(message)
        elif isinstance(message, PreparePrompt):
            await self._prepare(message)
        else:
            self.on_move(message)

    async def _take(self, take: TakeStream) -> None:
        error: str | None = None
        known = self.streams.get(take.stream)
        if known is not None and known.take.epoch <= take.epoch and (take.keep or known.take.epoch == take.epoch):
            await self._go_on(known, take)
        elif known is None or known.take.epoch < take.epoch:
            try:
                if known is None:
                    self.check_room()
                self._taking.add(take.stream)
                # One that is here: behind its batches that were admitted before.
                rank = Rank.CONTROL if known is None else Rank.STAGE
                await self._device.call(rank, partial(self._open, take))
                await self._place(take)
            except Exception as caught:
                log.exception("cannot take stream %s", take.stream)
                await self._undo(take.stream)
                error = f"{self._context.instance} cannot hold the stream: {one_line(caught)}"
            finally:
                self._taking.discard(take.stream)
            if error is not None:
                self._close_later(take.stream)
        answer = StreamTaken(
            service="worker", instance=self._context.instance, stream=take.stream, epoch=take.epoch, error=error
        )
        await self._bus.publish(subjects.TAKEN, answer)

    def _open(self, take: TakeStream) -> None:
        self._runtime.open(take.stream, take.height, take.width, take.spec.steps)

    async def _go_on(self, placed: Placed, take: TakeStream) -> None:
        """The stream is here: it keeps its state in a newer epoch, or what waits of this one may come."""
        released = take.epoch == placed.take.epoch and not placed.take.hold
        placed.take = take
        await placed.chunks.go_on(take.epoch, take.hold and not released)

    async def _place(self, take: TakeStream) -> None:
        known = self.streams.pop(take.stream, None)
        if known is not None:
            await _unsubscribe(known)
        size = 2 * take.credits + 16
        placed = Placed(take, ChunkGate(self._on_chunk, take.epoch, take.hold, size))
        self.streams[take.stream] = placed
        per_role = (
            (Role.ENCODE, "chunk", placed.chunks.on_chunk),
            (Role.DECODE, "denoised", partial(self._decode, placed)),
        )
        for role, leaf, handler in per_role:
            if role in self._settings.roles:
                subject = subjects.stream(take.stream, leaf)
                placed.subscriptions.append(await self._bus.subscribe(subject, handler, size=size))

    async def _decode(self, placed: Placed, received: Received) -> None:
        async with placed.decoding:  # an export in between would miss what the gate has counted already
            await self._on_denoised(received)

    async def _undo(self, stream: str) -> None:
        placed = self.streams.pop(stream, None)
        if placed is not None:
            await _unsubscribe(placed)

    async def _leave(self, stream: str, epoch: int) -> None:
        placed = self.streams.get(stream)
        if placed is None or placed.take.epoch > epoch:
            return
        del self.streams[stream]
        await _unsubscribe(placed)
        # A batch that stage 0 admitted runs whole: assignments and batches travel apart, so the slots stay a moment.
        asyncio.get_running_loop().call_later(CLOSE_DELAY_S, self._close_later, stream)

    async def leave_all(self) -> None:
        """Let every stream go, at once: nothing of what is under way counts any more."""
        gone, self.streams = self.streams, {}
        for placed in gone.values():
            await _unsubscribe(placed)

        def close() -> None:
            for stream in gone:
                if not self._is_here(stream):
                    self._runtime.close(stream)

        # With the stage's rank: batches that were admitted run whole, and find their slots.
        await self._device.call(Rank.STAGE, close)

    def _close_later(self, stream: str) -> None:
        def close() -> None:
            if not self._is_here(stream):
                self._runtime.close(stream)

        if not self._is_here(stream):
            try:  # with the stage's rank: behind every batch that was admitted before
                self._device.submit(Rank.STAGE, close, lambda _: None)
            except QueueFullError:
                log.warning("stream %s keeps its state: the device has too much to do", stream)

    def _is_here(self, stream: str) -> bool:
        return stream in self.streams or stream in self._taking

    async def _prepare(self, message: PreparePrompt) -> None:
        placed = self.streams.get(message.stream)
        error: str | None = None
        if placed is None or placed.take.epoch != message.epoch:
            error = f"stream {message.stream} is not on {self._context.instance}"
        elif self._runtime.stage is not None:
            stored = await self._context.store.get_embedding(message.digest)
            if stored is None:
                error = "the prompt's embedding is no longer in the session store"
            else:
                stage = self._runtime.stage
                try:
                    embedding = from_store(*stored)
                    await self._device.call(
                        Rank.CONTROL,
                        lambda: stage.set_prompt(message.stream, message.version, embedding, message.oldest),
                    )
                except Exception as caught:
                    log.exception("cannot prepare prompt %d of %s", message.version, message.stream)
                    error = one_line(caught)
        ready = PromptReady(
            pipeline=self._runtime.place.pipeline,
            stage=self._runtime.place.stage,
            stream=message.stream,
            epoch=message.epoch,
            version=message.version,
            error=error,
        )
        await self._bus.publish(subjects.pipeline_done(self._settings.pipeline), ready)

    async def _scale_loras(self, message: ScaleLoras) -> None:
        role = self._runtime.stage
        if role is None:
            return
        try:  # with the stage's rank: between batches, behind those that were admitted before
            await self._device.call(Rank.STAGE, lambda: role.stage.scale_loras(message.scales))
        except (ValueError, QueueFullError) as error:
            log.warning("LoRA scales %s are not applied: %s", message.scales, error)

    async def on_text(self, received: Received) -> TextEncoded:
        """Encode a prompt once; its embedding is kept by content."""
        message: TextEncode = received.message
        text = self._runtime.text
        if text is None or message.model != self._settings.model:
            return TextEncoded(error=f"this worker serves {self._settings.model}, not {message.model}")
        parts = [(part.text, part.weight) for part in message.parts]
        key = mix_digest(message.model, parts) if parts else digest(message.model, message.prompt)
        if await self._context.store.get_embedding(key) is None:
            run = partial(text.mix, parts) if parts else partial(text.run, message.prompt)
            try:
                embedding = await asyncio.to_thread(run) if text.beside else await self._device.call(Rank.TEXT, run)
            except Exception as caught:
                log.exception("cannot encode a prompt")
                return TextEncoded(error=one_line(caught))
            await self._context.store.put_embedding(key, *to_store(embedding))
        return TextEncoded(digest=key)


def one_line(error: BaseException | None) -> str:
    """What was raised, for a message."""
    text = str(error).splitlines()
    return f"{type(error).__name__}: {text[0][:200] if text else ''}"


async def _unsubscribe(placed: Placed) -> None:
    for subscription in placed.subscriptions:
        await subscription.unsubscribe()
