"""Which ring place a new frame takes: two rules, decided on the device for all blocks and items at once.

``OldestFirst`` is right: places fill in order, then the oldest frame that is no sink goes; an unlike frame replaces the
sink it is least like, and only once the ring is full. ``PublicRule`` is what the public code does, kept to replay its
recorded data: a queue of place ends that is not oldest-first, sink tests against places never written, and hits that
wait in the queue.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as fn

_NEVER = torch.iinfo(torch.int64).max


class PlaceRule(Protocol):
    """Chooses places; holds one record per (block, slot). All tensors int64 on the device."""

    attends_unwritten: bool

    def reset(self, slot: int) -> None:
        """The slot is empty."""
        ...

    def fork(self, source: int, slot: int) -> None:
        """The slot's record becomes the source's."""
        ...

    def grow(self, slots: int) -> None:
        """Make room for this many slots."""
        ...

    def reblock(self, blocks: int, kept: Mapping[int, int]) -> None:
        """Have so many blocks: block ``new`` is what ``kept[new]`` was, the others are empty."""
        ...

    def records(self) -> dict[str, Tensor]:
        """All that is known, by name: [blocks, slots, …] each."""
        ...

    def plan(self, slots: Tensor, frames: int, filled: Sequence[int]) -> Tensor:
        """Places [blocks, B, frames] the items would take without a sink test."""
        ...

    def choose(self, block: int, slots: Tensor, planned: Tensor, likeness: Tensor | None, full: Tensor) -> Tensor:
        """The places [B, frames] of one block, given the likeness [B, sinks] of the new frame to each sink."""
        ...

    def written(self, slots: Tensor, places: Tensor, latents: Tensor) -> None:
        """Note the latent indices [B, frames] written at places [blocks, B, frames]."""
        ...


class OldestFirst:
    """Fill in order, then overwrite the oldest frame that is no sink."""

    attends_unwritten = False

    def __init__(self, blocks: int, slots: int, ring: int, sinks: int, threshold: float, device: torch.device) -> None:
        self.ring, self.sinks, self.threshold = ring, sinks, threshold
        self.latents = torch.full((blocks, slots, ring), -1, dtype=torch.int64, device=device)
        self._order = torch.arange(ring, device=device) - ring
        self._is_sink = torch.arange(ring, device=device) < sinks

    def reset(self, slot: int) -> None:
        """See PlaceRule."""
        self.latents[:, slot].fill_(-1)

    def fork(self, source: int, slot: int) -> None:
        """See PlaceRule."""
        self.latents[:, slot].copy_(self.latents[:, source])

    def grow(self, slots: int) -> None:
        """See PlaceRule."""
        blocks, held, ring = self.latents.shape
        self.latents = torch.cat([self.latents, self.latents.new_full((blocks, slots - held, ring), -1)], 1)

    def reblock(self, blocks: int, kept: Mapping[int, int]) -> None:
        """See PlaceRule."""
        self.latents = moved_rows(self.latents, blocks, kept, -1)

    def records(self) -> dict[str, Tensor]:
        """See PlaceRule."""
        return {"latents": self.latents}

    def plan(self, slots: Tensor, frames: int, filled: Sequence[int]) -> Tensor:
        """Empty places in order, then written ones by age; written sinks never."""
        held = self.latents[:, slots]
        written = torch.where(self._is_sink, _NEVER, held)
        rank = torch.where(held < 0, self._order, written)
        return rank.topk(frames, -1, largest=False, sorted=True).indices

    def choose(self, block: int, slots: Tensor, planned: Tensor, likeness: Tensor | None, full: Tensor) -> Tensor:
        """The least like sink when the ring is full and its likeness is under the threshold, else as planned."""
        if likeness is None:
            return planned
        least, sink = likeness.min(-1, keepdim=True)
        return torch.where((least < self.threshold) & full[:, None], sink, planned)

    def written(self, slots: Tensor, places: Tensor, latents: Tensor) -> None:
        """See PlaceRule."""
        self.latents[:, slots] = self.latents[:, slots].scatter(-1, places, latents.expand(len(places), -1, -1))


class PublicRule:
    """The public code's queue of place ends, one per block and slot."""

    attends_unwritten = True

    def __init__(self, blocks: int, slots: int, ring: int, sinks: int, threshold: float, device: torch.device) -> None:
        self.ring, self.sinks, self.threshold = ring, sinks, threshold
        self.latents = torch.full((blocks, slots, ring), -1, dtype=torch.int64, device=device)
        # Fill writes and waiting hits: at most one of each per frame of the ring before evictions balance them.
        self._queue = torch.zeros(blocks, slots, 4 * ring, dtype=torch.int64, device=device)
        self._length = torch.zeros(blocks, slots, dtype=torch.int64, device=device)
        self._evicts = torch.zeros(0, dtype=torch.bool, device=device)

    def reset(self, slot: int) -> None:
        """See PlaceRule."""
        self.latents[:, slot].fill_(-1)
        self._queue[:, slot].zero_()
        self._length[:, slot].zero_()

    def fork(self, source: int, slot: int) -> None:
        """See PlaceRule."""
        for record in (self.latents, self._queue, self._length):
            record[:, slot].copy_(record[:, source])

    def grow(self, slots: int) -> None:
        """See PlaceRule."""
        more = slots - self.latents.shape[1]
        self.latents, self._queue, self._length = (
            torch.cat([record, record.new_full((len(record), more, *record.shape[2:]), fill)], 1)
            for record, fill in ((self.latents, -1), (self._queue, 0), (self._length, 0))
        )

    def reblock(self, blocks: int, kept: Mapping[int, int]) -> None:
        """See PlaceRule."""
        self.latents = moved_rows(self.latents, blocks, kept, -1)
        self._queue, self._length = (moved_rows(t, blocks, kept, 0) for t in (self._queue, self._length))

    def records(self) -> dict[str, Tensor]:
        """See PlaceRule."""
        return {"latents": self.latents, "queue": self._queue, "length": self._length}

    def plan(self, slots: Tensor, frames: int, filled: Sequence[int]) -> Tensor:
        """The place a fill write takes; an eviction's is chosen per block from its queue."""
        self._evicts = torch.tensor([f + frames > self.ring for f in filled], device=slots.device)
        starts = torch.tensor(list(filled), device=slots.device)
        places = starts[:, None] + torch.arange(frames, device=slots.device)
        return places.expand(self.latents.shape[0], -1, -1)

    def choose(self, block: int, slots: Tensor, planned: Tensor, likeness: Tensor | None, full: Tensor) -> Tensor:
        """Hits go to the front of the queue, an eviction pops it, a fill write appends to it."""
        queue, length = self._queue[block, slots], self._length[block, slots]
        frames = planned.shape[-1]
        if likeness is not None:
            least, sink = likeness.min(-1, keepdim=True)
            hit = least < self.threshold
            queue = torch.where(hit, torch.cat([sink + 1, queue[:, :-1]], -1), queue)
            length = length + hit[:, 0].long()
        front = queue[:, :1]
        evicts = self._evicts[:, None]
        popped = torch.where(evicts, fn.pad(queue[:, 1:], (0, 1)), queue)
        length = length - self._evicts.long()
        end = torch.where(evicts, front, planned[:, -1:] + 1 + frames)
        last = popped.gather(-1, (length - 1).clamp_min(0)[:, None])
        fill_adds = (end > self.sinks) & (end <= self.ring) & ((end != last) | (length == 0)[:, None])
        adds = torch.where(evicts, front > self.sinks, fill_adds)
        appended = popped.scatter(-1, length[:, None], end)
        self._queue[block, slots] = torch.where(adds, appended, popped)
        self._length[block, slots] = length + adds[:, 0].long()
        offsets = torch.arange(frames, device=planned.device) - frames
        return torch.where(evicts, front + offsets, planned)

    def written(self, slots: Tensor, places: Tensor, latents: Tensor) -> None:
        """See PlaceRule."""
        self.latents[:, slots] = self.latents[:, slots].scatter(-1, places, latents.expand(len(places), -1, -1))


def moved_rows(record: Tensor, rows: int, kept: Mapping[int, int], fill: int) -> Tensor:
    """A tensor of so many rows: row ``new`` is the record's row ``kept[new]``, the others are filled."""
    moved = record.new_full((rows, *record.shape[1:]), fill)
    for new, old in kept.items():
        moved[new].copy_(record[old])
    return moved
