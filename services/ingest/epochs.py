"""Which epoch a chunk carries. Pure.

When a stream changes its pipeline, the old one finishes what was numbered before, and the new one begins with a whole frame
block: so the epoch changes with a chunk's number, not with the time at which it was told.
"""

from __future__ import annotations


class Epochs:
    """A stream's epochs: the one of its newest chunks, and the one before."""

    def __init__(self, epoch: int) -> None:
        self.first = self.epoch = epoch  # as it was first taken; as it was told last
        self.from_chunk = 0  # the first chunk that carries ``epoch``
        self._former = epoch

    def adopt(self, epoch: int, numbered: int, block_chunks: int = 1, block_start: int = 0) -> int:
        """From the next frame block on, chunks carry ``epoch``; ``numbered`` of them have their number already.

        Frame blocks of ``block_chunks`` chunks begin at ``block_start``. Returns the first chunk of the epoch; a repetition
        gets the same answer. Raises ValueError for an older epoch.
        """
        if epoch < self.epoch:
            raise ValueError(f"epoch {epoch} is over: it is {self.epoch} already")
        if epoch > self.epoch:
            self._former, self.epoch = self.of(numbered), epoch
            self.from_chunk = numbered + (block_start - numbered) % max(1, block_chunks)
        return self.from_chunk

    def of(self, number: int) -> int:
        """The epoch that a chunk carries."""
        return self.epoch if number >= self.from_chunk else self._former
