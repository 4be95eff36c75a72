"""What a stage keeps of each stream: its slots in the KV pools and its prompts' entries. Weights are shared, this is not."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from shared.engine.model.attention import ContextKv
from shared.engine.model.kv_cache import KvPool, NoSlotError, SlotHead
from shared.engine.model.prompt_pool import PromptPool
from shared.engine.moving import Carried
from shared.engine.plan.items import Item, SlotOpKind, check_batch
from shared.engine.plan.spec import PATCH, ModelSpec

T = TypeVar("T")

MAX_MIXES = 8
"""Mixtures of two prompts kept per stream: more than a stream has blocks under way."""


class StageError(RuntimeError):
    """A batch this stage cannot run: an unknown stream, prompt or shape. The message says which."""


@dataclass(slots=True)
class StreamState:
    """One stream: latent size, step index → slot in the pool of that size, prompt version → entry, mixture → entry."""

    height: int
    width: int
    slots: dict[int, int] = field(default_factory=dict)
    prompts: dict[int, int] = field(default_factory=dict)
    mixes: OrderedDict[tuple[int, int, float], int] = field(default_factory=OrderedDict)
    embeddings: dict[int, Tensor] = field(
        default_factory=dict
    )  # on the host, without padding: prompts are made anew of them
    aside: Carried | None = None  # its slots, while they are on the host
    ahead: Carried | None = None  # slots of blocks that this stage is about to get
    missing: set[int] = field(default_factory=set[int])  # blocks whose slots have not come: it cannot run
    promised: int = 0  # slots that there must be room for

    @property
    def size(self) -> tuple[int, int]:
        """Latent (height, width)."""
        return self.height, self.width


class Streams:
    """The streams of one stage.

    ``make_pool(height, width)`` makes the KV pool of a latent size when it is first needed; ``pool_gone`` is told when no
    stream needs it any more.
    """

    def __init__(
        self, prompts: PromptPool, make_pool: Callable[[int, int], KvPool], pool_gone: Callable[[KvPool], None]
    ) -> None:
        self.prompts = prompts
        self._make_pool, self._pool_gone = make_pool, pool_gone
        self._pools: dict[tuple[int, int], KvPool] = {}
        self.states: dict[str, StreamState] = {}

    def open(self, stream: str, height: int, width: int, slots: int = 0) -> None:
        """Make the stream known, with empty slots; its prompts stay. Room for so many ``slots`` is made at once.

        Raises StageError for a size of no whole patches, and where there is no room: the stream is not known then.
        """
        if height % PATCH or width % PATCH or min(height, width) < PATCH:
            raise StageError(f"stream {stream}: {height}×{width} latents are no multiple of the patch {PATCH}")
        known = self.states.get(stream)
        self.empty(stream)
        fresh = StreamState(height, width, promised=slots)
        if known is not None:
            fresh.prompts, fresh.mixes, fresh.embeddings = known.prompts, known.mixes, known.embeddings
        self.states[stream] = fresh
        if slots:
            try:
                self._reserve(height, width)
            except (torch.OutOfMemoryError, NoSlotError) as error:
                self.close(stream)
                raise StageError(
                    f"there is no room for {slots} KV slots of {width * 8}×{height * 8}: {error}"
                ) from None

    def close(self, stream: str) -> None:
        """Forget the stream and free what it held. Unknown streams are no error."""
        self.empty(stream)
        known = self.states.pop(stream, None)
        if known is None:
            return
        for entry in (*known.prompts.values(), *known.mixes.values()):
            self.prompts.give_back(entry)
        pool = self._pools.get(known.size)
        if pool is not None and pool.idle and len(self._pools) > 1:
            # Sizes come and go; the last one used keeps its memory for the next stream.
            self._pool_gone(self._pools.pop(known.size))

    def of(self, stream: str) -> StreamState:
        """The stream. Raises StageError for one that is not open."""
        try:
            return self.states[stream]
        except KeyError:
            raise StageError(f"stream {stream} is not open on this stage") from None

    # --- slots -------------------------------------------------------------------------------------------------------

    @property
    def by_size(self) -> dict[tuple[int, int], KvPool]:
        """Latent (height, width) → the pool in use."""
        return dict(self._pools)

    @property
    def pools(self) -> tuple[KvPool, ...]:
        """The pools in use, one per latent size."""
        return tuple(self._pools.values())

    def pool(self, height: int, width: int) -> KvPool:
        """The pool of this latent size."""
        if (height, width) not in self._pools:
            self._pools[height, width] = self._make_pool(height, width)
        return self._pools[height, width]

    def _reserve(self, height: int, width: int) -> None:
        """Room for what the streams of this size were promised. Those on the host get theirs when they come back."""
        held = [known for known in self.states.values() if known.size == (height, width) and known.aside is None]
        needed = sum(max(known.promised, len(known.slots)) for known in held)
        self._with_room((height, width), lambda: self.pool(height, width).reserve(needed))

    def _with_room(self, size: tuple[int, int], make: Callable[[], T]) -> T:
        """Make something in the pool of this size; where memory is short, without the pools that nobody uses."""
        try:
            return make()
        except torch.OutOfMemoryError:
            unused = [other for other, pool in self._pools.items() if pool.idle and other != size]
            if not unused:
                raise
            for other in unused:
                self._pool_gone(self._pools.pop(other))
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            return make()

    def empty(self, stream: str) -> None:
        """Give the stream's slots back, wherever they are."""
        known = self.states.get(stream)
        if known is not None:
            self.give_back(stream)
            known.aside = known.ahead = None

    def give_back(self, stream: str) -> None:
        """Give the pool's slots back."""
        known = self.states[stream]
        for slot in known.slots.values():
            self._pools[known.size].give_back(slot)
        known.slots, known.missing = {}, set()

    def heads(self, stream: str) -> dict[int, SlotHead]:
        """Step index → what the host knows of its slot in the pool."""
        known = self.states[stream]
        return {step: self.pool(*known.size).head(slot) for step, slot in known.slots.items()}

    def slot(self, stream: str, step: int) -> int:
        """The pool's slot of a step index; taken now, next to the one before, if there is none yet."""
        known = self.states[stream]
        if step not in known.slots:
            near = known.slots.get(step - 1)
            known.slots[step] = self._with_room(known.size, lambda: self.pool(*known.size).take(near))
        return known.slots[step]

    # --- prompts -----------------------------------------------------------------------------------------------------

    def put_prompt(self, stream: str, version: int, prompt: Sequence[ContextKv], words: int) -> None:
        """Keep a prompt version's keys and values, padded behind ``words``; one of the same number is replaced."""
        known = self.of(stream)
        self._forget(known, lambda number: number == version)
        known.prompts[version] = self.prompts.put(prompt, words)

    def keep_prompts(self, stream: str, keep: set[int]) -> None:
        """Forget all prompt versions of the stream but these, and the mixtures that they were part of."""
        self._forget(self.of(stream), lambda number: number not in keep)

    def prompt_of(self, item: Item) -> int:
        """The entry that an item reads; a mixture of two prompts is made when it is first asked for."""
        known = self.states[item.stream]
        newer = known.prompts[item.prompt_version]
        if not item.blend:
            return newer
        key = (item.prompt_version, item.blend_version, item.blend)
        if key in known.mixes:
            known.mixes.move_to_end(key)
            return known.mixes[key]
        if len(known.mixes) >= MAX_MIXES:
            self.prompts.give_back(known.mixes.popitem(last=False)[1])
        known.mixes[key] = self.prompts.mix(newer, known.prompts[item.blend_version], item.blend)
        return known.mixes[key]

    def unmix(self) -> None:
        """Forget every mixture: they are made again when they are asked for."""
        for known in self.states.values():
            while known.mixes:
                self.prompts.give_back(known.mixes.popitem()[1])

    def _forget(self, known: StreamState, gone: Callable[[int], bool]) -> None:
        for version in [number for number in known.prompts if gone(number)]:
            self.prompts.give_back(known.prompts.pop(version))
            known.embeddings.pop(version, None)
        for key in [key for key in known.mixes if gone(key[0]) or gone(key[1])]:
            self.prompts.give_back(known.mixes.pop(key))

    # --- what is held ------------------------------------------------------------------------------------------------

    def latents(self, stream: str) -> dict[int, Tensor]:
        """Per step index: the latent index in every ring place, [blocks, ring] on the host, −1 where none is. Waits."""
        known = self.of(stream)
        if not known.slots:
            return {}
        rule = self.pool(*known.size).rule
        return {step: rule.latents[:, slot].cpu() for step, slot in known.slots.items()}

    def nbytes(self, stream: str) -> int:
        """Bytes that the stream holds: its slots and its prompts."""
        known = self.of(stream)
        entries = len(known.prompts) + len(known.mixes)
        prompts = self.prompts.nbytes() // self.prompts.keys.shape[1] * entries
        return prompts + (self.pool(*known.size).slot_bytes() * len(known.slots) if known.slots else 0)


def check_forward(
    items: Sequence[Item], x: Tensor, streams: Streams, spec: ModelSpec, wire_width: int | None
) -> StreamState:
    """Everything that can be wrong with a batch, before any slot changes. Returns the state of its first stream.

    x is what the stage was given: latents [B, T, C, h, w], or with a ``wire_width`` the stage before's [B, F·tokens,
    wire_width]. Raises StageError.
    """
    if not items:
        raise StageError("an empty batch")
    first = streams.of(items[0].stream)
    try:
        check_batch(items)
    except ValueError as error:
        raise StageError(str(error)) from None
    for item in items:
        known = streams.of(item.stream)
        if known.missing:
            some = ", ".join(map(str, sorted(known.missing)))
            raise StageError(f"slots of stream {item.stream} in blocks {some} have not come: import them, or reset it")
        if known.size != first.size:
            raise StageError(f"streams {items[0].stream} and {item.stream} differ in size")
        if missing := [version for version in item.prompts if version not in known.prompts]:
            raise StageError(f"prompt {missing[0]} of stream {item.stream} is not ready on this stage")
        most = _room(item, known, spec)
        if item.forward_frames > most:
            raise StageError(
                f"block {item.block} of stream {item.stream} has {item.forward_frames} frames, its slot takes {most}"
            )
    tokens = first.height * first.width // PATCH**2
    shape = (
        (len(items), items[0].frames, spec.latent_channels, *first.size)
        if wire_width is None
        else (len(items), items[0].forward_frames * tokens, wire_width)
    )
    if tuple(x.shape) != shape:
        raise StageError(f"input is {list(x.shape)}, the batch needs {list(shape)}")
    return first


def _room(item: Item, known: StreamState, spec: ModelSpec) -> int:
    """Latent frames the item's slot can take: all of it while empty, else what is no sink."""
    emptied = any(op.kind is SlotOpKind.RESET and op.slot == item.slot for op in item.ops)
    if emptied or item.slot not in known.slots:
        return spec.ring
    return spec.ring - spec.sinks
