"""Cross-attention keys and values of the prompts in use, of all blocks of a stage, in one place on the device.

An entry is one prompt, or a mixture of two while one fades into the other. A forward reads entries by number, so that a new
prompt changes an index and not the sequence of kernels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from shared.engine.model.attention import ContextKv
from shared.engine.plan.spec import ModelSpec


class PromptPool:
    """keys, values: [blocks, entries, text_len, heads, D] in the model's dtype. Grows by doubling.

    ``generation`` changes whenever the tensors are made anew, which ends what was captured with their addresses.
    """

    def __init__(
        self, spec: ModelSpec, blocks: int, device: torch.device, dtype: torch.dtype, entries: int = 2
    ) -> None:
        shape = (blocks, entries, spec.text_len, spec.heads, spec.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.generation = 0
        self._free = list(range(entries))

    def put(self, prompt: Sequence[ContextKv]) -> int:
        """A new entry of one pair [1, text_len, heads, D] per block; returns its number."""
        entry = self._take()
        for block, (k, v) in enumerate(prompt):
            self.keys[block, entry].copy_(k[0])
            self.values[block, entry].copy_(v[0])
        return entry

    def mix(self, newer: int, older: int, share: float) -> int:
        """A new entry, ``share`` of the older and the rest of the newer one; returns its number."""
        entry = self._take()
        for store in (self.keys, self.values):
            mixed = torch.lerp(store[:, newer].float(), store[:, older].float(), share)
            store[:, entry].copy_(mixed)
        return entry

    def give_back(self, entry: int) -> None:
        """The entry is free again."""
        self._free.append(entry)
        self._free.sort()

    def nbytes(self) -> int:
        """Bytes held."""
        return sum(t.numel() * t.element_size() for t in (self.keys, self.values))

    @property
    def used(self) -> int:
        """Entries in use."""
        return self.keys.shape[1] - len(self._free)

    def at(self, block: int, entry: int) -> ContextKv:
        """One entry for every item, where it lies: [1, text_len, heads, D] each."""
        return self.keys[block, entry : entry + 1], self.values[block, entry : entry + 1]

    def of(self, block: int, entries: Tensor) -> ContextKv:
        """The entries [B] of a batch: [B, text_len, heads, D] each."""
        return self.keys[block].index_select(0, entries), self.values[block].index_select(0, entries)

    def _take(self) -> int:
        if not self._free:
            held = self.keys.shape[1]
            self.keys, self.values = (
                torch.cat([t, t.new_zeros(t.shape[0], held, *t.shape[2:])], 1) for t in (self.keys, self.values)
            )
            self.generation += 1
            self._free = list(range(held, 2 * held))
        return self._free.pop(0)
