"""When the cuts of a pipeline should move: measured stage times in, a proposal out. Pure; time is passed in (seconds).

A stage's time is not predicted here but measured over the last seconds, because every batch passes every stage: what the
stages took for the *same* batches can be compared directly, whatever the batches were made of.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from services.scheduler.placement import Cuts, WorkerCost, best_cuts, moved_blocks, ranges_of, stage_costs

WINDOW_S = 2.0  # long enough for some ten batches of one stream, short enough to see a straggler in time
MIN_BATCHES = 6
LONGEST_S = 6.0  # fewer batches in the window than that: the newest so many, if they are not older
SPELL_S = 0.25
MAX_BATCHES = 512
MIN_TIMES = 4  # of encode or decode, likewise
MAX_TIMES = 64
BUSY = 0.3  # of its time: a slowest stage that is less busy makes nobody late
GAIN = 0.10  # below that, noise and what is left out of the model decide
DOUBT = 0.75  # so much of the gain must be left if the times were off by their standard error, against the move
SUSTAIN_S = 1.75  # window + this + the move itself stay within 5 s
COOLDOWN_S = 3.0  # the window must fill with the new cuts
MEMORY_S = 60.0  # moves within this time make further ones dearer
MOST_GAIN = 0.25  # … but a stage that became twice as slow is always worth a move
MAX_COOLDOWN_S = 120.0  # after failures, doubling
HORIZON_S = 30.0  # a move must pay for its pause within this time


def lasting(times: Sequence[float]) -> list[float]:
    """The times, with the longest one as long as the second longest: one long stall is no straggler.

    Their sum sees a worker that is held up in bursts, which a median does not.
    """
    ordered = sorted(times)
    most = ordered[-2] if len(ordered) > 2 else ordered[-1]
    return [min(each, most) for each in times]


def mean_of(at: Sequence[float], times: Sequence[float], weights: Sequence[float]) -> tuple[float, float]:
    """The weighted mean of times and its standard error.

    What is taken within :data:`SPELL_S` counts as one observation: what holds a worker up lasts longer than one batch.
    """
    total = sum(weights)
    mean = sum([each * weight for each, weight in zip(times, weights, strict=True)]) / total
    spells: dict[int, float] = {}
    for moment, each, weight in zip(at, times, weights, strict=True):
        spell = int(moment / SPELL_S)
        spells[spell] = spells.get(spell, 0.0) + (each - mean) * weight
    return mean, sum([off * off for off in spells.values()]) ** 0.5 / total


@dataclass(frozen=True, slots=True)
class _Passed:
    """A batch that came back."""

    at: float
    units: int
    stage_ms: tuple[float, ...]
    encoded: float
    finished: float


def _times() -> deque[tuple[float, float]]:
    return deque[tuple[float, float]](maxlen=MAX_TIMES)


@dataclass(slots=True)
class StageMeter:
    """What the stages of one pipeline took lately.

    Encode and decode are told in any unit of work that costs about the same each time, the same in :meth:`batch` and
    :meth:`role`: the service counts latent tokens, so that long chunks and large pictures weigh what they cost.
    """

    batches: deque[_Passed] = field(default_factory=lambda: deque[_Passed](maxlen=MAX_BATCHES))
    since: float = 0.0
    encoded: float = 0.0  # units since the last batch came back, whether they entered a batch or were dropped
    _roles: dict[str, deque[tuple[float, float]]] = field(
        default_factory=lambda: {"encode": _times(), "decode": _times()}
    )

    def batch(self, now: float, units: int, stage_ms: Sequence[float], finished: float) -> None:
        """A batch of ``units`` came back; so much was ``finished`` with it, to be decoded."""
        self.batches.append(_Passed(now, max(1, units), tuple(stage_ms), self.encoded, finished))
        self.encoded = 0.0

    def role(self, role: str, ms: float, now: float) -> None:
        """Encode or decode took ``ms`` for one unit; others are ignored."""
        if role in self._roles:
            self._roles[role].append((now, ms))

    def cleared(self, now: float) -> None:
        """The cuts moved, or the pipeline was rebuilt: what was measured before tells nothing any more."""
        self.batches.clear()
        self.since, self.encoded = now, 0.0

    def workers(self, cuts: Cuts, layers: int, decode_stage: int, now: float) -> list[WorkerCost] | None:
        """Each worker's costs in busy milliseconds per second, or None while too little has been measured."""
        batches, stages = self.batches, len(cuts) + 1
        while (
            batches and now - batches[0].at > WINDOW_S and (len(batches) > MIN_BATCHES or _is_old(batches[0].at, now))
        ):
            batches.popleft()
        seen = [batch for batch in batches if len(batch.stage_ms) == stages]
        if len(seen) < MIN_BATCHES:
            return None
        per_s = 1.0 / max(min(max(WINDOW_S, now - seen[0].at), now - self.since), 0.1)
        at, units = [batch.at for batch in seen], [float(batch.units) for batch in seen]
        sure = per_s * sum(units)
        encode = self._took("encode", now) * sum([batch.encoded for batch in seen])
        decode = self._took("decode", now) * sum([batch.finished for batch in seen])
        found: list[WorkerCost] = []
        for stage, blocks in enumerate(ranges_of(cuts, layers)):
            mean, off = mean_of(at, lasting([batch.stage_ms[stage] / batch.units for batch in seen]), units)
            fixed = (encode if stage == 0 else 0.0) + (decode if stage == decode_stage else 0.0)
            found.append(WorkerCost(mean * sure / len(blocks), fixed * per_s, off=off * sure / len(blocks)))
        return found

    def _took(self, role: str, now: float) -> float:
        """Milliseconds for one unit."""
        times = self._roles[role]
        while len(times) > MIN_TIMES and now - times[0][0] > WINDOW_S:
            times.popleft()
        return sum(lasting([ms for _, ms in times])) / len(times) if times else 0.0


def _is_old(at: float, now: float) -> bool:
    return now - at > LONGEST_S


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

    Nothing moves while the slowest stage is less than :data:`BUSY` and no stream has given anything up: it would help nobody.
    The gain must not be one of chance: three quarters of what is asked are left if the times that speak for the move were too
    long by their standard error, and the others too short.

    Each move within the last minute doubles the gain that the next one must promise (up to :data:`MOST_GAIN`), so cuts do
    not swing to and fro; each failed one doubles the time until the next try.
    """

    _better_since: float | None = None
    _not_before: float = 0.0
    _moves: deque[float] = field(default_factory=lambda: deque[float](maxlen=8))
    _failures: int = 0

    def observe(
        self,
        now: float,
        workers: Sequence[WorkerCost] | None,
        cuts: Cuts,
        layers: int,
        block_pause_s: float,
        degraded: bool = False,
    ) -> Proposal | None:
        """A proposal, once it has been better for long enough. ``block_pause_s``: what moving one block stands still for.

        ``degraded``: a stream there has less than it asks for, so however little is done, more was wanted.
        """
        proposal = None
        if (
            workers
            and now >= self._not_before
            and (degraded or max(stage_costs(cuts, workers, layers)) >= BUSY * 1000.0)
        ):
            proposal = self._better(now, workers, cuts, layers, block_pause_s)
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
        costs = stage_costs(cuts, workers, layers)
        before, after = max(costs), max(stage_costs(best, workers, layers))
        proposal = Proposal(best, before, after, len(moved_blocks(cuts, best, layers)))
        lately = sum(now - at < MEMORY_S for at in self._moves)
        asked = min(GAIN * 2**lately, MOST_GAIN)
        pays = (before - after) / 1000.0 * HORIZON_S >= proposal.blocks * block_pause_s
        if proposal.gain < asked or not pays:
            return None
        slowest = costs.index(before)
        doubted = [
            replace(worker, per_block=worker.per_block + (-worker.off if stage == slowest else worker.off))
            for stage, worker in enumerate(workers)
        ]
        left = 1.0 - max(stage_costs(best, doubted, layers)) / max(stage_costs(cuts, doubted, layers))
        return proposal if left >= DOUBT * asked else None

    def moved(self, now: float) -> None:
        """The cuts were moved."""
        self._moves.append(now)
        self._failures = 0
        self._better_since, self._not_before = None, now + COOLDOWN_S

    def failed(self, now: float) -> None:
        """Moving them failed, and was undone."""
        self._failures += 1
        self._better_since, self._not_before = None, now + min(COOLDOWN_S * 2**self._failures, MAX_COOLDOWN_S)
