"""Cross-attention keys and values of the prompts in use, of all blocks of a stage, in one place on the device.

An entry is one prompt, or a mixture of two while one fades into the other. A forward reads entries by number, so that a new
prompt changes an index and not the sequence of kernels.

Padding is kept once. The published models pad a prompt to 512 vectors with zeros and attend to the padding like to words. All
padding gives the same key and value, so m of them count like one whose score is raised by log m. An entry therefore holds
the words and a few padding rows that share the rest between them: the same result (up to rounding) from an eighth of the
memory, which for a 14B model is 0.05 instead of 0.4 GB a prompt.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from shared.engine.model.attention import ContextKv
from shared.engine.model.places import moved_rows
from shared.engine.plan.spec import ModelSpec

ROWS = (64, 128, 256)
"""How many rows an entry may have short of the model's text_len: few sizes, since each has its own kernels and graphs."""


class PromptPool:
    """keys, values: [blocks, entries, rows, heads, D] in the model's dtype. Entries grow by doubling, rows by steps.

    ``generation`` changes whenever the tensors are made anew, which ends what was captured with their addresses.
    """

    def __init__(
        self, spec: ModelSpec, blocks: int, device: torch.device, dtype: torch.dtype, entries: int = 2
    ) -> None:
        self._text_len, self._steps = spec.text_len, ROWS
        self.rows = self._rows_for(0)
        shape = (blocks, entries, self.rows, spec.heads, spec.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self._counts = torch.zeros(entries, self.rows, device=device, dtype=dtype)
        self._words = [0] * entries
        self.generation = 0
        self._free = list(range(entries))

    def put(self, prompt: Sequence[ContextKv], words: int) -> int:
        """A new entry of one pair [1, text_len, heads, D] per block, all padding from row ``words`` on; its number."""
        self._make_room(words)
        entry = self._take(words)
        for block, (k, v) in enumerate(prompt):
            self.keys[block, entry].copy_(k[0, : self.rows])
            self.values[block, entry].copy_(v[0, : self.rows])
        return entry

    def mix(self, newer: int, older: int, share: float) -> int:
        """A new entry, ``share`` of the older and the rest of the newer one; returns its number."""
        entry = self._take(max(self._words[newer], self._words[older]))
        for store in (self.keys, self.values):
            mixed = torch.lerp(store[:, newer].float(), store[:, older].float(), share)
            store[:, entry].copy_(mixed)
        return entry

    def fill(self, block: int, entry: int, prompt: ContextKv) -> None:
        """One block's keys and values [1, text_len, heads, D] of an entry that was put before."""
        self.keys[block, entry].copy_(prompt[0][0, : self.rows])
        self.values[block, entry].copy_(prompt[1][0, : self.rows])

    def reblock(self, blocks: int, kept: Mapping[int, int]) -> None:
        """Have so many blocks from now on: block ``new`` is what ``kept[new]`` was, the others are to be filled."""
        self.keys = moved_rows(self.keys, blocks, kept, 0)
        self.values = moved_rows(self.values, blocks, kept, 0)
        self.generation += 1

    def give_back(self, entry: int) -> None:
        """The entry is free again."""
        self._free.append(entry)
        self._free.sort()

    def nbytes(self) -> int:
        """Bytes held."""
        return sum(t.numel() * t.element_size() for t in (self.keys, self.values, self._counts))

    @property
    def used(self) -> int:
        """Entries in use."""
        return self.keys.shape[1] - len(self._free)

    def at(self, block: int, entry: int) -> ContextKv:
        """One entry for every item, where it lies: [1, rows, heads, D] each."""
        return self.keys[block, entry : entry + 1], self.values[block, entry : entry + 1]

    def of(self, block: int, entries: Tensor) -> ContextKv:
        """The entries [B] of a batch: [B, rows, heads, D] each."""
        return self.keys[block].index_select(0, entries), self.values[block].index_select(0, entries)

    def bias(self, entries: Tensor | int) -> Tensor | None:
        """What is added to the scores, [B or 1, 1, 1, rows]: log how often a row counts. None: every row counts once."""
        if self.rows == self._text_len:
            return None
        counts = self._counts[entries : entries + 1] if isinstance(entries, int) else self._counts[entries]
        return counts[:, None, None]

    def _rows_for(self, words: int) -> int:
        """Rows of an entry of so many words: at least one of them padding, unless there is none."""
        return next((rows for rows in self._steps if words < rows < self._text_len), self._text_len)

    def _make_room(self, words: int) -> None:
        """Lengthen every entry until the words and a row of padding fit."""
        rows = self._rows_for(words)
        if rows <= self.rows:
            return
        more = rows - self.rows
        # The last row of every entry is padding.
        self.keys, self.values = (
            torch.cat([t, t[:, :, -1:].expand(-1, -1, more, -1, -1)], 2) for t in (self.keys, self.values)
        )
        self.rows = rows
        self.generation += 1
        self._counts = self._counts.new_zeros(len(self._words), rows)
        for entry, known in enumerate(self._words):
            self._count(entry, known)

    def _take(self, words: int) -> int:
        if not self._free:
            held = self.keys.shape[1]
            self.keys, self.values = (
                torch.cat([t, t.new_zeros(t.shape[0], held, *t.shape[2:])], 1) for t in (self.keys, self.values)
            )
            self._counts = torch.cat([self._counts, torch.zeros_like(self._counts)])
            self._words += [0] * held
            self.generation += 1
            self._free = list(range(held, 2 * held))
        entry = self._free.pop(0)
        self._count(entry, words)
        return entry

    def _count(self, entry: int, words: int) -> None:
        """Each padding row of the entry counts for its share of all the padding."""
        self._words[entry] = words
        self._counts[entry].zero_()
        if words < self.rows < self._text_len:
            self._counts[entry, words:].fill_(math.log((self._text_len - words) / (self.rows - words)))
