"""One forward's view of the KV cache: where each item's frames are written, and what its queries look at.

Everything that the device needs lies in tensors made before the first block, so that a forward is a fixed sequence of kernels
on fixed shapes. Items whose slots hold the same number of frames form a group: its attention has one shape, whoever else is
in the batch. Once rings are full there is one group, which is what a captured graph relies on.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as fn

from shared.engine.model.attention import Kernel
from shared.engine.model.kv_cache import KvPool


class CacheRun:
    """B items of ``frames`` frames, each on its own slot. Call :meth:`attend` once per block, then :meth:`finish`.

    ``latents`` and ``starts`` are each item's first latent index and RoPE start frame.
    """

    def __init__(
        self,
        pool: KvPool,
        slots: Sequence[int],
        frames: int,
        latents: Sequence[int],
        starts: Sequence[int],
        kernel: Kernel,
    ) -> None:
        self.pool, self.frames, self._kernel = pool, frames, kernel
        ring = pool.spec.ring
        self._begins = [_begin(pool, slot, start, frames) for slot, start in zip(slots, starts, strict=True)]
        after = [min(begin + frames, ring) for begin in self._begins]
        for slot, held, start in zip(slots, after, starts, strict=True):
            pool.filled[slot], pool.last_start[slot] = held, start
        self._tests = frames == 1 and pool.tests_sinks
        self.slots = _tensor(slots, pool.device)
        self.full = _tensor([begin >= ring for begin in self._begins], pool.device)
        self.latents = (torch.tensor(list(latents))[:, None] + torch.arange(frames)).to(pool.device, non_blocking=True)
        self._groups = [
            _Group([i for i, n in enumerate(after) if n == held], slots, held, pool.device)
            for held in sorted(set(after))
        ]
        self._plan: Tensor | None = None
        self._chosen: list[Tensor] = []

    @property
    def uniform(self) -> bool:
        """Whether every slot is full after this forward: its kernels and shapes are those of any other such forward."""
        return len(self._groups) == 1 and self._groups[0].held == self.pool.spec.ring

    @property
    def run(self) -> tuple[int, tuple[int, ...]] | None:
        """Which neighbouring slots are read where they lie: (the first slot, the items in slot order), or None."""
        return self._groups[0].layout

    def begin(self) -> None:
        """Plan the places, before the first block."""
        self._plan = self.pool.rule.plan(self.slots, self.frames, self._begins)
        self._chosen = []

    def attend(self, block: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store k and v [B, L, heads, D] of pool block ``block``, then attend to all the slot holds → [B, L, heads, D]."""
        pool = self.pool
        if self._plan is None:
            raise RuntimeError("begin() comes before the first block")
        batch, dim = q.shape[0], pool.spec.dim
        new_k = k.reshape(batch, self.frames, pool.tokens, dim)
        new_v = v.reshape(batch, self.frames, pool.tokens, dim)
        means = torch.stack((new_k.mean(2, dtype=torch.float32), new_v.mean(2, dtype=torch.float32)), 2)
        places = pool.rule.choose(block, self.slots, self._plan[block], self._likeness(block, means), self.full)
        self._chosen.append(places)
        rows = (self.slots[:, None] * pool.spec.ring + places).flatten()
        for store, new in ((pool.keys, new_k), (pool.values, new_v), (pool.means, means)):
            store[block].flatten(0, 1).index_copy_(0, rows, new.flatten(0, 1))
        if len(self._groups) == 1:
            # All items in their order: the slots that a recorded forward is given anew.
            return self._groups[0].attend(pool, block, q, self._kernel, self.slots)
        y = torch.empty_like(q)
        for group in self._groups:
            members = group.items
            part = group.attend(
                pool, block, q.index_select(0, members), self._kernel, self.slots.index_select(0, members)
            )
            y.index_copy_(0, group.items, part)
        return y

    def finish(self) -> None:
        """Note what stands where, after the last block."""
        self.pool.rule.written(self.slots, torch.stack(self._chosen), self.latents)

    def _likeness(self, block: int, means: Tensor) -> Tensor | None:
        """[B, sinks]: half the cosine of the mean keys plus half that of the mean values; None where nothing is tested."""
        if not self._tests:
            return None
        sinks = self.pool.means[block, :, : self.pool.spec.sinks].index_select(0, self.slots)
        return fn.cosine_similarity(sinks, means, dim=-1).mean(-1)


def _begin(pool: KvPool, slot: int, start: int, frames: int) -> int:
    """How many frames precede this write. The public code writes a repeated start over the same place."""
    filled = pool.filled[slot]
    if pool.rule.attends_unwritten and pool.last_start[slot] == start and filled < pool.spec.ring:
        return filled - frames
    return filled


class _Group:
    """Items of one forward whose slots hold the same number of frames.

    Where the slots are neighbours, in whatever order the items came, keys and values are read where they lie and the
    queries are put into the slots' order instead: they are a ring's length fewer.
    """

    def __init__(self, members: list[int], slots: Sequence[int], held: int, device: torch.device) -> None:
        order = sorted(range(len(members)), key=lambda i: slots[members[i]])
        chosen = [slots[members[i]] for i in order]
        self.held = held
        self.items = _tensor(members, device)
        neighbours = chosen == list(range(chosen[0], chosen[0] + len(chosen)))
        self.layout = (chosen[0], tuple(order)) if neighbours else None
        in_order = order == list(range(len(order)))
        self._order = None if in_order else _tensor(order, device)
        self._back = None if in_order else _tensor(sorted(range(len(order)), key=order.__getitem__), device)

    def attend(self, pool: KvPool, block: int, q: Tensor, kernel: Kernel, slots: Tensor) -> Tensor:
        """q [b, L, heads, D] over the group's ``slots`` [b]."""
        heads = pool.spec.heads
        if self.layout is None:
            k, v = (_tokens(s[block].index_select(0, slots), self.held, heads) for s in (pool.keys, pool.values))
            return kernel(q, k, v)
        first = self.layout[0]
        k, v = (_tokens(s[block, first : first + len(q)], self.held, heads) for s in (pool.keys, pool.values))
        if self._order is None or self._back is None:
            return kernel(q, k, v)
        return kernel(q.index_select(0, self._order), k, v).index_select(0, self._back)


def _tokens(store: Tensor, held: int, heads: int) -> Tensor:
    """[b, ring, tokens, dim] → the tokens of the first ``held`` places, [b, held·tokens, heads, D]."""
    return store[:, :held].flatten(1, 2).unflatten(-1, (heads, -1))


def _tensor(values: Sequence[int] | Sequence[bool], device: torch.device) -> Tensor:
    return torch.tensor(list(values)).to(device, non_blocking=True)
