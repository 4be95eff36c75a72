"""An engine without numbers: the rules of slots, stages and batches, with digests where tensors would be.

It runs the same items in the same sequence as the real stages, so a scheduler can be tried against it without torch: the
"pixels" of a block are a digest of everything its forwards read. Two runs give the same pixels exactly when every
forward read the same latent frames, made the same way, at the same distances in time, under the same prompt.

A stage holds a range of DiT blocks and, for each, the slots of every stream. Attention reads a slot as a set, so the
places only decide which frame is overwritten. Only distances between rotations count, as in RoPE.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from shared.engine.plan.items import Item, SlotOp, SlotOpKind, check_batch
from shared.engine.plan.ring import Ring
from shared.engine.plan.split import split_blocks

Digest = str


class SymbolicFault(RuntimeError):
    """The batch breaks a rule that a real stage could not see, or a sequence number is missing."""


# --- the maths -------------------------------------------------------------------------------------------------------


def mix(*parts: object) -> Digest:
    """A digest of everything given: equal exactly for equal inputs."""
    return hashlib.blake2b(repr(parts).encode(), digest_size=12).hexdigest()


def noised_input(item: Item, source: Digest) -> Digest:
    """Step 0's input: ε keyed by (seed, latent frame, step; 0 while all stands still), mixed with the source latents by s."""
    return mix("input", item.seed, item.noise_frames[0], item.frames, 0, item.noise_scale, source)


def cached_key(layer: int, activations: Digest, timestep: int, frame: int) -> Digest:
    """What DiT block ``layer`` caches of the block's ``frame``-th latent frame."""
    return mix("kv", layer, activations, timestep, frame)


def frame_inputs(item_input: Digest, frames: int) -> list[Digest]:
    """The frames of a block's input one by one, as a slot keeps them for a re-cache."""
    return [mix("frame", item_input, offset) for offset in range(frames)]


def window_input(frames: Iterable[Digest]) -> Digest:
    """The input of a block that runs its window along."""
    return mix("window", *frames)


def attend(
    layer: int, activations: Digest, timestep: int, prompt: object, reads: Iterable[tuple[int, Digest]]
) -> Digest:
    """DiT block ``layer``: ``reads`` are (distance to the block's first frame, cached key), in any order.

    ``prompt`` is whatever tells the prompt, or the mixture of two, from others.
    """
    return mix("out", layer, activations, timestep, prompt, sorted(reads))


def prompt_of(item: Item) -> object:
    """What tells an item's prompt from others."""
    return (*item.prompts, item.blend) if item.blend else item.prompt_version


def renoised(item: Item, clean: Digest) -> Digest:
    """The next step's input: x0 and fresh ε, keyed by the next step."""
    return mix("renoise", clean, item.seed, item.noise_frames[0], item.step + 1, item.next_timestep)


# --- slots -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class CachedFrame:
    """One latent frame in a place: ``latent`` counts the stream's frames, ``rotation`` is the RoPE position of its key."""

    latent: int
    block: int
    rotation: int
    key: Digest


@dataclass(slots=True)
class SymbolicSlot:
    """One slot of one DiT block: which frame stands in which place."""

    ring: Ring
    places: dict[int, CachedFrame] = field(default_factory=lambda: dict[int, CachedFrame]())
    newest_block: int = -1

    def history(self) -> tuple[CachedFrame, ...]:
        """The frames that are cached, oldest first."""
        return tuple(sorted(self.places.values(), key=lambda frame: frame.latent))

    def copy(self) -> SymbolicSlot:
        """An equal slot that goes on by itself, ring positions included."""
        return SymbolicSlot(self.ring.copy(), dict(self.places), self.newest_block)

    def rerotate(self, frames: int) -> None:
        """Move the rotation of every cached key."""
        self.places = {at: replace(kept, rotation=kept.rotation + frames) for at, kept in self.places.items()}


@dataclass(frozen=True, slots=True)
class SymbolicBatch:
    """Like a StageBatch: items with their inputs (source latents at step 0, else the re-noised ones)."""

    generation: int
    seq: int
    entries: tuple[tuple[Item, Digest], ...]


class SymbolicStage:
    """The DiT blocks ``layers`` of every stream."""

    def __init__(self, layers: range, ring: int, sinks: int, is_first: bool) -> None:
        self.layers = layers
        self._ring = ring
        self._sinks = sinks
        self._is_first = is_first
        self._slots: dict[tuple[str, int, int], SymbolicSlot] = {}  # (stream, layer, slot)
        self._kept: dict[tuple[str, int], list[Digest]] = {}  # (stream, slot): the inputs seen, newest last
        self._generation = 0
        self._next_seq = 0

    def slot(self, stream: str, layer: int, slot: int) -> SymbolicSlot | None:
        """A slot as it stands, or None when it was never written."""
        return self._slots.get((stream, layer, slot))

    def reset(self) -> None:
        """Every slot is empty."""
        self._slots.clear()
        self._kept.clear()

    def run(self, batch: SymbolicBatch) -> SymbolicBatch | None:
        """Operations of all items, then the forward of all items. None for a batch of an older generation.

        Raises SymbolicFault on a gap in ``seq`` and on what would read or write a slot out of order.
        """
        if batch.generation < self._generation:
            return None
        if batch.generation > self._generation:
            self.reset()
            self._generation, self._next_seq = batch.generation, 0
        if batch.seq != self._next_seq:
            raise SymbolicFault(f"expected batch {self._next_seq} of generation {self._generation}, got {batch.seq}")
        self._next_seq += 1
        try:
            check_batch(item for item, _ in batch.entries)
        except ValueError as error:
            raise SymbolicFault(str(error)) from error
        for item, _ in batch.entries:
            for op in item.ops:
                self._apply(item, op)
        outputs = tuple((item, self._forward(item, given)) for item, given in batch.entries)
        return replace(batch, entries=outputs)

    def _apply(self, item: Item, op: SlotOp) -> None:
        if op.kind is SlotOpKind.FORK:
            self._kept[item.stream, op.slot] = list(self._kept.get((item.stream, op.source), []))
        for layer in self.layers:
            key = (item.stream, layer, op.slot)
            if op.kind is SlotOpKind.RESET:
                self._slots[key] = SymbolicSlot(Ring(self._ring, self._sinks))
            elif op.kind is SlotOpKind.FORK:
                self._slots[key] = self._held(item, layer, op.source).copy()
            else:
                self._held(item, layer, op.slot).rerotate(op.frames)

    def _held(self, item: Item, layer: int, slot: int) -> SymbolicSlot:
        held = self._slots.get((item.stream, layer, slot))
        if held is None:
            raise SymbolicFault(f"slot {slot} of stream {item.stream} is empty at block {item.block} step {item.step}")
        return held

    def _forward(self, item: Item, given: Digest) -> Digest:
        activations = self._input(item, given) if self._is_first else given
        for layer in self.layers:
            slot = self._held(item, layer, item.slot)
            if slot.newest_block >= item.block:
                raise SymbolicFault(
                    f"slot {item.slot} of stream {item.stream} holds block {slot.newest_block}, "
                    f"block {item.block} comes too late"
                )
            slot.newest_block = item.block
            first = item.first_latent - item.context
            for offset, place in enumerate(slot.ring.write(first, item.forward_frames)):
                slot.places[place] = CachedFrame(
                    latent=first + offset,
                    block=item.block,
                    rotation=item.start_frame - item.context + offset,
                    key=cached_key(layer, activations, item.timestep, offset),
                )
            reads = ((kept.rotation - item.start_frame, kept.key) for kept in slot.places.values())
            activations = attend(layer, activations, item.timestep, prompt_of(item), reads)
        return activations

    def _input(self, item: Item, given: Digest) -> Digest:
        own = noised_input(item, given) if item.step == 0 else given
        kept = self._kept.setdefault((item.stream, item.slot), [])
        kept += frame_inputs(own, item.frames)
        del kept[: -self._ring]
        return window_input(kept[-item.forward_frames :]) if item.context else own


@dataclass(frozen=True, slots=True)
class SymbolicResult:
    """What came out of one item: clean x0, and the next step's input (None after the last step)."""

    item: Item
    clean: Digest
    next_input: Digest | None


class SymbolicPipeline:
    """S stages with a queue before each one. Nothing runs until :meth:`advance` is called for a stage."""

    def __init__(self, stages: int, layers: int, ring: int, sinks: int) -> None:
        blocks = split_blocks(layers, stages)
        self.stages = [SymbolicStage(held, ring, sinks, stage == 0) for stage, held in enumerate(blocks)]
        self._queues: list[deque[SymbolicBatch]] = [deque() for _ in self.stages]
        self._generation = 0
        self._next_seq = 0

    def submit(self, entries: Sequence[tuple[Item, Digest]]) -> SymbolicBatch:
        """Queue a batch before stage 0; its sequence number is dense within the generation."""
        batch = SymbolicBatch(self._generation, self._next_seq, tuple(entries))
        self._next_seq += 1
        self._queues[0].append(batch)
        return batch

    def busy(self) -> tuple[int, ...]:
        """Stages that have a batch waiting."""
        return tuple(stage for stage, queue in enumerate(self._queues) if queue)

    def advance(self, stage: int) -> tuple[SymbolicResult, ...]:
        """Run the oldest batch that waits before ``stage``. Results come only from the last stage."""
        output = self.stages[stage].run(self._queues[stage].popleft())
        if output is None:
            return ()
        if stage + 1 < len(self.stages):
            self._queues[stage + 1].append(output)
            return ()
        return tuple(
            SymbolicResult(item, clean, None if item.is_last_step else renoised(item, clean))
            for item, clean in output.entries
        )

    def crash(self, stage: int) -> None:
        """A stage comes back empty and the pipeline is rebuilt: a new generation; batches under way are gone.

        The other stages still hold their slots until the new generation's first batch reaches them.
        """
        self.stages[stage].reset()
        for queue in self._queues:
            queue.clear()
        self._generation += 1
        self._next_seq = 0

    def slot(self, stream: str, layer: int, slot: int) -> SymbolicSlot | None:
        """A slot of one DiT block, wherever that block is held."""
        holder = next(stage for stage in self.stages if layer in stage.layers)
        return holder.slot(stream, layer, slot)
