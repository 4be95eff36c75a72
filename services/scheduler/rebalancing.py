"""One move of DiT blocks between the workers of a pipeline, as a machine: what has to happen, in which order, until when.

Pure; time is passed in (seconds). Acting is :mod:`services.scheduler.recutting`'s.

``preparing``: who gains blocks loads their weights, while everything goes on. ``quiescing``: nothing new is dispatched until
nothing is in flight. ``moving``: each stream's slots of the blocks that move are copied. ``cutting``: every worker takes its
new blocks, with a new generation that keeps the slots. Until cutting nothing has changed, and the move can be given up;
after it has begun there is no way back: a failure then costs a pipeline fault (rule 1), and the workers are cut again
without slots to keep (``repairing``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import groupby, pairwise


class Phase(StrEnum):
    """Where a move is."""

    IDLE = "idle"
    PREPARING = "preparing"
    QUIESCING = "quiescing"
    MOVING = "moving"
    CUTTING = "cutting"
    REPAIRING = "repairing"


_MOVES: Mapping[Phase, frozenset[Phase]] = {
    Phase.IDLE: frozenset({Phase.PREPARING, Phase.REPAIRING}),
    Phase.PREPARING: frozenset({Phase.QUIESCING, Phase.IDLE}),
    Phase.QUIESCING: frozenset({Phase.MOVING, Phase.IDLE}),
    Phase.MOVING: frozenset({Phase.CUTTING, Phase.IDLE}),
    Phase.CUTTING: frozenset({Phase.IDLE, Phase.REPAIRING}),
    Phase.REPAIRING: frozenset({Phase.IDLE}),
}

PREPARE_S = 120.0  # weights come from a disk, and everything goes on meanwhile
MOVE_S = 10.0
CUT_S = 5.0
REPAIR_S = 120.0


class IllegalPhaseError(ValueError):
    """A phase that may not follow."""


@dataclass(frozen=True, slots=True)
class Transfer:
    """Blocks that go from one stage's worker to another's, for every stream."""

    blocks: range
    source: int
    target: int


def transfers(before: Sequence[range], after: Sequence[range]) -> tuple[Transfer, ...]:
    """What changes hands, in the fewest pieces. Blocks that nobody had before need no transfer."""
    had = {block: stage for stage, blocks in enumerate(before) for block in blocks}
    moves = [
        (block, had[block], stage)
        for stage, blocks in enumerate(after)
        for block in blocks
        if block in had and had[block] != stage and block not in before[stage]
    ]
    pieces: list[Transfer] = []
    for (_, source, target), group in groupby(enumerate(moves), lambda at: (at[1][0] - at[0], at[1][1], at[1][2])):
        blocks = [block for _, (block, _, _) in group]
        pieces.append(Transfer(range(blocks[0], blocks[-1] + 1), source, target))
    return tuple(pieces)


def gains(before: Sequence[range], after: Sequence[range]) -> dict[int, range]:
    """Stages that need weights which they have not, with all the blocks that they will have."""
    return {stage: new for stage, (old, new) in enumerate(zip(before, after, strict=True)) if set(new) - set(old)}


def whole(blocks: Sequence[range], layers: int) -> bool:
    """Whether the stages' blocks are the model, in order, each exactly once."""
    edges = [0, *(edge for each in blocks for edge in (each.start, each.stop)), layers]
    return all(len(each) > 0 for each in blocks) and all(a == b for a, b in list(pairwise(edges))[::2])


class Rebalancing:
    """The state of one pipeline's move. ``reason`` is why it began; ``last`` how the one before ended, in one line."""

    def __init__(self) -> None:
        self.phase = Phase.IDLE
        self.before: tuple[range, ...] = ()
        self.after: tuple[range, ...] = ()
        self.reason = ""
        self.last = ""
        self.since = 0.0
        self._quiet_since = 0.0

    @property
    def busy(self) -> bool:
        """Whether a move is under way."""
        return self.phase is not Phase.IDLE

    def begin(self, before: Sequence[range], after: Sequence[range], reason: str, now: float) -> None:
        """Start a move. Raises IllegalPhaseError while another is under way, ValueError when nothing would change."""
        if tuple(before) == tuple(after):
            raise ValueError("nothing would move")
        self._to(Phase.PREPARING, now)
        self.before, self.after, self.reason = tuple(before), tuple(after), reason

    def mend(self, before: Sequence[range], after: Sequence[range], reason: str, now: float) -> None:
        """Workers do not fit together (one came back as it was started): cut them, with nothing to keep."""
        self._to(Phase.REPAIRING, now)
        self.before, self.after, self.reason = tuple(before), tuple(after), reason

    def prepared(self, now: float) -> None:
        """The weights are there."""
        self._to(Phase.QUIESCING, now)
        self._quiet_since = now

    def quiet(self, now: float) -> None:
        """Nothing is in flight."""
        self._to(Phase.MOVING, now)

    def moved(self, now: float) -> None:
        """Every stream's slots are where they will be needed."""
        self._to(Phase.CUTTING, now)

    def done(self, now: float) -> None:
        """Every worker has its new blocks."""
        stood = now - self._quiet_since
        if self.phase is Phase.CUTTING:
            self.last = f"moved to {self._told()}, the pipeline stood still for {stood * 1000:.0f} ms"
        else:
            self.last = f"cut to {self._told()}: {self.reason}"
        self._to(Phase.IDLE, now)

    def failed(self, why: str, now: float) -> bool:
        """A step failed, or took too long. Whether the pipeline must be repaired: else all is as it was before."""
        if self.phase is Phase.CUTTING:
            self._to(Phase.REPAIRING, now)
            self.reason = why
            return True
        where = self.phase
        self._to(Phase.IDLE, now)
        self.last = f"not moved, {where} failed: {why}"
        return False

    def limit_s(self, quiesce_s: float) -> float:
        """How long the phase may take; ``quiesce_s`` is what S+1 batches may."""
        return {
            Phase.PREPARING: PREPARE_S,
            Phase.QUIESCING: quiesce_s,
            Phase.MOVING: MOVE_S,
            Phase.CUTTING: CUT_S,
            Phase.REPAIRING: REPAIR_S,
        }.get(self.phase, 0.0)

    def _to(self, phase: Phase, now: float) -> None:
        if phase not in _MOVES[self.phase]:
            raise IllegalPhaseError(f"illegal move {self.phase} → {phase}")
        self.phase, self.since = phase, now

    def _told(self) -> str:
        return ", ".join(f"{blocks.start}…{blocks.stop - 1}" for blocks in self.after)
