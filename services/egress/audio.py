"""Puts the parts of the sound back into their order. Pure."""

from __future__ import annotations

from shared.contracts.events import AudioCaptured

# Parts that may wait for an earlier one before it counts as lost.
MAX_WAITING = 8


class AudioOrder:
    """Parts come numbered densely; the bus may lose, repeat or delay any of them.

    ``resumed``: a predecessor had the parts before the first that comes.
    """

    def __init__(self, *, resumed: bool = False) -> None:
        self.next = 0
        self._resumed = resumed
        self.lost = 0
        self.repeated = 0
        self._waiting: dict[int, AudioCaptured] = {}

    def push(self, part: AudioCaptured) -> list[AudioCaptured]:
        """A part that came; the parts that are now next, in order."""
        if self._resumed:
            self.next, self._resumed = part.seq, False
        if part.seq < self.next or part.seq in self._waiting:
            self.repeated += 1
            return []
        self._waiting[part.seq] = part
        if len(self._waiting) > MAX_WAITING:
            self._pass_gap()
        return self._in_order()

    def flush(self, parts: int) -> list[AudioCaptured]:
        """Nothing more comes of ``parts`` sent: what is here, in order; the gaps are lost."""
        out: list[AudioCaptured] = []
        while self._waiting:
            self._pass_gap()
            out += self._in_order()
        self.lost += max(0, parts - self.next)
        return out

    def complete(self, parts: int) -> bool:
        """Whether all of ``parts`` have come."""
        return self.next >= parts

    def _pass_gap(self) -> None:
        first = min(self._waiting)
        self.lost += max(0, first - self.next)
        self.next = max(self.next, first)

    def _in_order(self) -> list[AudioCaptured]:
        out: list[AudioCaptured] = []
        while (part := self._waiting.pop(self.next, None)) is not None:
            out.append(part)
            self.next += 1
        return out
