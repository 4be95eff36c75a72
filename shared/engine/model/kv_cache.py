"""The rolling KV cache: preallocated rings of frames, one per (stream, step), for all blocks of a stage.

The host knows how many frames each slot holds; *which* place a frame takes is decided on the device
(:mod:`shared.engine.model.places`), so no forward waits for the device. Written places are always a prefix of the ring:
attention looks at that prefix and needs no mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as fn

from shared.engine.model.attention import Attend, attention
from shared.engine.model.places import OldestFirst, PublicRule
from shared.engine.model.rope import RopeTable, rotate
from shared.engine.plan.spec import ModelSpec


class NoSlotError(RuntimeError):
    """The cache holds as many slots as it may."""


@dataclass(frozen=True, slots=True)
class SlotCopy:
    """All that a slot holds, on the host: keys, values [blocks, ring, tokens, dim], means, and which latent is where."""

    filled: int
    last_start: int | None
    keys: Tensor
    values: Tensor
    means: Tensor
    latents: Tensor


class KvPool:
    """Slots of one latent size.

    keys, values: [blocks, slots, ring, tokens, dim] in the model's dtype, keys turned by RoPE; means [blocks, slots, ring, 2,
    dim] float32: each frame's mean key and mean value, which the sink test compares.
    """

    def __init__(
        self,
        spec: ModelSpec,
        blocks: int,
        tokens: int,
        device: torch.device,
        dtype: torch.dtype,
        *,
        slots: int = 2,
        max_slots: int = 4096,
        public_rule: bool = False,
    ) -> None:
        self.spec, self.tokens, self.max_slots = spec, tokens, max_slots
        self.device = device
        slots = min(slots, max_slots)
        shape = (blocks, slots, spec.ring, tokens, spec.dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.means = torch.zeros(blocks, slots, spec.ring, 2, spec.dim, device=device)
        rule = PublicRule if public_rule else OldestFirst
        threshold = -2.0 if spec.sink_threshold is None else spec.sink_threshold
        self.rule = rule(blocks, slots, spec.ring, spec.sinks, threshold, device)
        self.filled = [0] * slots
        self.last_start: list[int | None] = [None] * slots
        self._free = list(range(slots))

    @property
    def blocks(self) -> int:
        """DiT blocks held."""
        return self.keys.shape[0]

    @property
    def tests_sinks(self) -> bool:
        """Whether single frames may replace a sink."""
        return self.spec.sink_threshold is not None and self.spec.sinks > 0

    def take(self, near: int | None = None) -> int:
        """A free slot, the one after ``near`` if it can be had: neighbours need no gathering. NoSlotError at the limit."""
        if not self._free:
            self._grow()
        slot = near + 1 if near is not None and near + 1 in self._free else self._free[0]
        self._free.remove(slot)
        self.reset(slot)
        return slot

    def give_back(self, slot: int) -> None:
        """The slot is free again."""
        self._free.append(slot)
        self._free.sort()

    def nbytes(self) -> int:
        """Bytes of the tensors held."""
        return sum(t.numel() * t.element_size() for t in (self.keys, self.values, self.means))

    def reset(self, slot: int) -> None:
        """The slot becomes empty."""
        self.filled[slot], self.last_start[slot] = 0, None
        self.rule.reset(slot)
        if self.rule.attends_unwritten:
            for tensor in (self.keys, self.values, self.means):
                tensor[:, slot].zero_()

    def fork(self, source: int, slot: int) -> None:
        """The slot becomes a copy of the source, ring positions included."""
        self.filled[slot], self.last_start[slot] = self.filled[source], self.last_start[source]
        self.rule.fork(source, slot)
        for tensor in (self.keys, self.values, self.means):
            tensor[:, slot].copy_(tensor[:, source])

    def rerotate(self, slot: int, turn: RopeTable) -> None:
        """Every key of the slot is turned by the table of :meth:`Rope.shift`."""
        heads = (self.spec.heads, -1)
        keys = self.keys[:, slot]
        keys.copy_(rotate(keys.flatten(1, 2).unflatten(-1, heads), turn).flatten(-2).view_as(keys))
        means = self.means[:, slot, :, 0]
        means.copy_(rotate(means.unflatten(-1, heads), turn).flatten(-2))

    @property
    def idle(self) -> bool:
        """Whether no slot is in use."""
        return len(self._free) == self.keys.shape[1]

    def reserve(self, slots: int) -> None:
        """Make room for this many slots at once, up to the limit, so that nothing is allocated while streams run."""
        if slots > self.keys.shape[1]:
            self._grow(slots)

    def copy_out(self, slot: int) -> SlotCopy:
        """A copy on the host. Waits for the device; what the public rule queues is not part of it."""
        parts = (t[:, slot].cpu().clone() for t in (self.keys, self.values, self.means, self.rule.latents))
        return SlotCopy(self.filled[slot], self.last_start[slot], *parts)

    def copy_in(self, slot: int, copy: SlotCopy) -> None:
        """The slot becomes what was copied out, of the same blocks and size."""
        self.filled[slot], self.last_start[slot] = copy.filled, copy.last_start
        parts = (copy.keys, copy.values, copy.means, copy.latents)
        for tensor, part in zip((self.keys, self.values, self.means, self.rule.latents), parts, strict=True):
            tensor[:, slot].copy_(part)

    def _grow(self, least: int = 0) -> None:
        held = self.keys.shape[1]
        slots = min(max(2 * held, least), self.max_slots)
        if slots <= held:
            raise NoSlotError(f"all {held} KV slots of this latent size are in use")
        self.keys, self.values, self.means = (
            torch.cat([t, t.new_zeros(t.shape[0], slots - held, *t.shape[2:])], 1)
            for t in (self.keys, self.values, self.means)
        )
        self.rule.grow(slots)
        self.filled += [0] * (slots - held)
        self.last_start += [None] * (slots - held)
        self._free += range(held, slots)


class CacheRun:
    """One forward's view of the pool: B items of ``frames`` frames, each on its own slot.

    Call :meth:`attend` once per block, then :meth:`finish`. A group is a run of items with the same number of written
    frames: its attention has one fixed shape, whoever else is in the batch.
    """

    def __init__(
        self, pool: KvPool, slots: Sequence[int], frames: int, latents: Sequence[int], starts: Sequence[int]
    ) -> None:
        self.pool, self.frames = pool, frames
        ring, device = pool.spec.ring, pool.device
        begins = [self._begin(slot, start) for slot, start in zip(slots, starts, strict=True)]
        self._tests = frames == 1 and pool.tests_sinks
        self._slots = torch.tensor(list(slots)).to(device, non_blocking=True)
        self._full = torch.tensor([b >= ring for b in begins]).to(device, non_blocking=True)
        self._latents = (torch.tensor(list(latents))[:, None] + torch.arange(frames)).to(device, non_blocking=True)
        self._plan = pool.rule.plan(self._slots, frames, begins)
        self._chosen: list[Tensor] = []
        after = [min(begin + frames, ring) for begin in begins]
        self._groups = [
            _Group([i for i, n in enumerate(after) if n == held], slots, held, device) for held in sorted(set(after))
        ]
        for slot, held, start in zip(slots, after, starts, strict=True):
            pool.filled[slot], pool.last_start[slot] = held, start

    def attend(self, block: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store k and v [B, L, heads, D] of pool block ``block``, then attend to all the slot holds → [B, L, heads, D]."""
        pool = self.pool
        batch, dim = q.shape[0], pool.spec.dim
        new_k = k.reshape(batch, self.frames, pool.tokens, dim)
        new_v = v.reshape(batch, self.frames, pool.tokens, dim)
        means = torch.stack((new_k.mean(2, dtype=torch.float32), new_v.mean(2, dtype=torch.float32)), 2)
        places = pool.rule.choose(block, self._slots, self._plan[block], self._likeness(block, means), self._full)
        self._chosen.append(places)
        rows = (self._slots[:, None] * pool.spec.ring + places).flatten()
        for store, new in ((pool.keys, new_k), (pool.values, new_v), (pool.means, means)):
            store[block].flatten(0, 1).index_copy_(0, rows, new.flatten(0, 1))
        if len(self._groups) == 1:
            return self._groups[0].attend(pool, block, q)
        y = torch.empty_like(q)
        for group in self._groups:
            y.index_copy_(0, group.items, group.attend(pool, block, q.index_select(0, group.items)))
        return y

    def bound(self, block: int) -> Attend:
        """:meth:`attend` of one block."""
        return partial(self.attend, block)

    def finish(self) -> None:
        """Note what stands where, after the last block."""
        self.pool.rule.written(self._slots, torch.stack(self._chosen), self._latents)

    def _begin(self, slot: int, start: int) -> int:
        """How many frames precede this write. The public code writes a repeated start over the same place."""
        filled = self.pool.filled[slot]
        if self.pool.rule.attends_unwritten and self.pool.last_start[slot] == start and filled < self.pool.spec.ring:
            return filled - self.frames
        return filled

    def _likeness(self, block: int, means: Tensor) -> Tensor | None:
        """[B, sinks]: half the cosine of the mean keys plus half that of the mean values; None where nothing is tested."""
        if not self._tests:
            return None
        sinks = self.pool.means[block, :, : self.pool.spec.sinks].index_select(0, self._slots)
        return fn.cosine_similarity(sinks, means, dim=-1).mean(-1)


class _Group:
    """Items of one forward whose slots hold the same number of frames."""

    def __init__(self, members: list[int], slots: Sequence[int], held: int, device: torch.device) -> None:
        chosen = [slots[i] for i in members]
        self.held = held
        self.items = torch.tensor(members).to(device, non_blocking=True)
        self._run = slice(chosen[0], chosen[-1] + 1) if chosen == list(range(chosen[0], chosen[-1] + 1)) else None
        self._slots = torch.tensor(chosen).to(device, non_blocking=True)

    def attend(self, pool: KvPool, block: int, q: Tensor) -> Tensor:
        """q [b, L, heads, D] over the group's slots. Neighbouring slots are read where they lie."""
        k, v = (self._read(store[block], pool.spec.heads) for store in (pool.keys, pool.values))
        return attention(q, k, v)

    def _read(self, store: Tensor, heads: int) -> Tensor:
        held = store[:, : self.held]
        picked = held[self._run] if self._run is not None else held.index_select(0, self._slots)
        return picked.flatten(1, 2).unflatten(-1, (heads, -1))
