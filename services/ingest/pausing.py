"""Commands to pause and to go on: each is carried out once, and answered whenever it comes. Pure; no I/O, no time."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

MAX_REMEMBERED = 64


@dataclass(frozen=True, slots=True)
class Answer:
    """A command took effect: a pause after ``chunk``, going on with it. −1: there is no such chunk."""

    command: str
    chunk: int
    pts: int
    reason: str


class Pauses:
    """What of one stream has been paused and resumed.

    A pause is answered at once, with the last chunk that was numbered; going on with the first one numbered after it.
    Assignments may be delivered again, and then long after a newer one: a known command changes nothing any more.
    """

    def __init__(self) -> None:
        self.last = (-1, -1)  # the newest chunk and the pts of its last frame
        self._told: OrderedDict[str, Answer] = OrderedDict()
        self._waiting: dict[str, int] = {}  # commands to go on → the chunk they came after

    def ask(self, command: str, paused: bool, *, ended: bool) -> tuple[bool, list[Answer]]:
        """A command came: whether it is to be carried out, and what can be answered now.

        ``ended``: no chunk will be numbered any more.
        """
        if (known := self._told.get(command)) is not None:
            return False, [known]
        if command in self._waiting:
            return False, []
        if paused:
            before = self._give_up("paused again before a chunk came")
            return not ended, [*before, self._tell(Answer(command, *self.last, "paused"))]
        self._waiting[command] = self.last[0]
        return not ended, self.finish() if ended else []

    def numbered(self, chunk: int, first_pts: int, last_pts: int) -> list[Answer]:
        """A chunk was numbered."""
        self.last = (chunk, last_pts)
        ready = [command for command, after in self._waiting.items() if after < chunk]
        for command in ready:
            del self._waiting[command]
        return [self._tell(Answer(command, chunk, first_pts, "resumed")) for command in ready]

    def finish(self) -> list[Answer]:
        """The source has ended: no chunk follows those commands that wait for one."""
        return self._give_up("resumed, but the source has ended")

    def _give_up(self, reason: str) -> list[Answer]:
        waiting, self._waiting = self._waiting, {}
        return [self._tell(Answer(command, -1, -1, reason)) for command in waiting]

    def _tell(self, answer: Answer) -> Answer:
        self._told[answer.command] = answer
        while len(self._told) > MAX_REMEMBERED:
            self._told.popitem(last=False)
        return answer
