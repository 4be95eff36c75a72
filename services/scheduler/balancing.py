"""When the cuts of a pipeline should move: measured stage times in, a proposal out. Pure; time is passed in (seconds).

A stage's time is not predicted here but measured over the last seconds, because every batch passes every stage: what the
stages took for the *same* batches can be compared directly, whatever the batches were made of.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

from services.scheduler.placement import Cuts, WorkerCost, best_cuts, moved_blocks, ranges_of, stage_costs

WINDOW_S = 2.0  # long enough for some ten batches of one stream, short enough to see a straggler in time
MIN_BATCHES = 6
MAX_BATCHES = 512
SMOOTH = 0.3  # weight of a new measurement of encode or decode
GAIN = 0.10  # below that, noise and what is left out of the model decide
SUSTAIN_S = 1.0  # window + this + the move itself stay within 5 s
COOLDOWN_S = 3.0  # the window must fill with the new cuts
MEMORY_S = 60.0  # moves within this time make further ones dearer
MOST_GAIN = 0.25  # … but a stage that became twice as slow is always worth a move
MAX_COOLDOWN_S = 120.0  # after failures, doubling
HORIZON_S = 30.0  # a move must pay for its pause within this time


@dataclass(frozen=True, slots=True)
class _Passed:
    """A batch that came back."""

    at: float
    units: int
    stage_ms: tuple[float, ...]
    encoded: float
    finished: float


@dataclass(slots=True)
class StageMeter:
    """What the stages of one pipeline took lately.

    Encode and decode are told in any unit of work that costs about the same each time, the same in :meth:`batch` and
    :meth:`role`: the service counts latent tokens, so that long chunks and large pictures weigh what they cost.
    """

    batches: deque[_Passed] = field(default_factory=lambda: deque[_Passed](maxlen=MAX_BATCHES))
    encode_ms: float = 0.0  # per unit
    decode_ms: float = 0.0
    since: float = 0.0
    encoded: float = 0.0  # units since the last batch came back, whether they entered a batch or were dropped

    def batch(self, now: float, units: int, stage_ms: Sequence[float], finished: float) -> None:
        """A batch of ``units`` came back; so much was ``finished`` with it, to be decoded."""
        self.batches.append(_Passed(now, max(1, units), tuple(stage_ms), self.encoded, finished))
        self.encoded = 0.0

    def role(self, role: str, ms: float) -> None:
        """Encode or decode took ``ms`` for one unit; others are ignored."""
        if role == "encode":
            self.encode_ms += (SMOOTH if self.encode_ms else 1.0) * (ms - self.encode_ms)
        elif role == "decode":
            self.decode_ms += (SMOOTH if self.decode_ms else 1.0) * (ms - self.decode_ms)

    def cleared(self, now: float) -> None:
        """The cuts moved, or the pipeline was rebuilt: what was measured before tells nothing any more."""
        self.batches.clear()
        self.since, self.encoded = now, 0.0

    def workers(self, cuts: Cuts, layers: int, decode_stage: int, now: float) -> list[WorkerCost] | None:
        """Each worker's costs in busy milliseconds per second, or None while too little has been measured."""
        while self.batches and now - self.batches[0].at > WINDOW_S:
            self.batches.popleft()
        stages = len(cuts) + 1
        seen = [batch for batch in self.batches if len(batch.stage_ms) == stages]
        if len(seen) < MIN_BATCHES:
            return None
        per_s = 1.0 / max(min(WINDOW_S, now - self.since), 0.1)
        found: list[WorkerCost] = []
        for stage, blocks in enumerate(ranges_of(cuts, layers)):
            # The median: a stall, or a slow time shorter than half the window, is no straggler.
            busy = median(batch.stage_ms[stage] / batch.units for batch in seen) * sum(batch.units for batch in seen)
            fixed = self.encode_ms * sum(batch.encoded for batch in seen) if stage == 0 else 0.0
            if stage == decode_stage:
                fixed += self.decode_ms * sum(batch.finished for batch in seen)
            found.append(WorkerCost(busy * per_s / len(blocks), fixed * per_s))
        return found


@dataclass(frozen=True, slots=True)
class Proposal:
    """Cuts that would be better. ``before`` and ``after`` are the slowest stage's busy milliseconds per second."""

    cuts: Cuts
    before: float
    after: float
    blocks: int  # how many move

    @property
    def gain(self) -> float:
        """The share of the slowest stage's time that would be saved."""
        return 1.0 - self.after / self.before if self.before > 0 else 0.0

    @property
    def reason(self) -> str:
        """One line."""
        before, after = self.before / 10, self.after / 10
        return f"the slowest stage was busy {before:.0f} % of the time, with cuts {list(self.cuts)} it will be {after:.0f} %"


@dataclass(slots=True)
class Balancer:
    """Decides for one pipeline. A better cut must gain :data:`GAIN`, for :data:`SUSTAIN_S`, and pay for its pause.

    Each move within the last minute doubles the gain that the next one must promise (up to :data:`MOST_GAIN`), so cuts do
    not swing to and fro; each failed one doubles the time until the next try.
    """

    _better_since: float | None = None
    _not_before: float = 0.0
    _moves: deque[float] = field(default_factory=lambda: deque[float](maxlen=8))
    _failures: int = 0

    def observe(
        self, now: float, workers: Sequence[WorkerCost] | None, cuts: Cuts, layers: int, block_pause_s: float
    ) -> Proposal | None:
        """A proposal, once it has been better for long enough. ``block_pause_s``: what moving one block stands still for."""
        proposal = (
            self._better(now, workers, cuts, layers, block_pause_s) if workers and now >= self._not_before else None
        )
        if proposal is None:
            self._better_since = None
            return None
        if self._better_since is None:
            self._better_since = now
        return proposal if now - self._better_since >= SUSTAIN_S else None

    def _better(
        self, now: float, workers: Sequence[WorkerCost], cuts: Cuts, layers: int, block_pause_s: float
    ) -> Proposal | None:
        best = best_cuts(workers, layers, current=cuts)
        if best == cuts:
            return None
        before, after = max(stage_costs(cuts, workers, layers)), max(stage_costs(best, workers, layers))
        proposal = Proposal(best, before, after, len(moved_blocks(cuts, best, layers)))
        lately = sum(now - at < MEMORY_S for at in self._moves)
        pays = (before - after) / 1000.0 * HORIZON_S >= proposal.blocks * block_pause_s
        return proposal if proposal.gain >= min(GAIN * 2**lately, MOST_GAIN) and pays else None

    def moved(self, now: float) -> None:
        """The cuts were moved."""
        self._moves.append(now)
        self._failures = 0
        self._better_since, self._not_before = None, now + COOLDOWN_S

    def failed(self, now: float) -> None:
        """Moving them failed, and was undone."""
        self._failures += 1
        self._better_since, self._not_before = None, now + min(COOLDOWN_S * 2**self._failures, MAX_COOLDOWN_S)
