"""Which items share the next forward: the most urgent first, grown while it gains and every member keeps its deadline.

Pure. Only work of one bucket (T, window that runs along, size) can share a forward. Nothing waits for ever: a live block is
run or dropped by its deadline, one that is under way has the earliest deadlines, and lossless streams have a share of
the device for themselves (:class:`LosslessShare`), in which the oldest goes first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from services.scheduler.forecast import Forecast
from services.scheduler.policies import Growth, Policy
from services.scheduler.stream_queue import Work

Bucket = tuple[int, int, int, int]
"""(latent frames, window that runs along, height, width)."""

LOSSLESS_SHARE = 0.1  # of the pipeline's time, when live streams want all of it
NEVER_NS = 1 << 63
MIN_COST_NS = 1_000_000  # of a forward nobody has measured, so that shares can be told at all
LOSSLESS_BATCH_NS = 50_000_000  # a lossless batch may keep live streams waiting for so long, or for one item


@dataclass(slots=True, eq=False)
class Ready:
    """A work that could run now. ``units`` and ``decode_units`` in latent tokens; ``left`` steps, this one included."""

    work: Work
    bucket: Bucket
    units: int
    decode_units: int
    left: int
    key: tuple[int, str, int] = (0, "", 0)  # smaller goes first; no two of one pipeline are equal
    remaining_ns: int = 0  # alone, until its pixels are there
    fresh_ns: int = 0  # the same but for a window that runs along
    aged_ns: int = 0  # taken off the order: its stream had chunks dropped in a row
    expires_ns: int = NEVER_NS  # the deadline of its last frame, if it may be dropped
    probes: bool = False  # it is run as long as that is not over, whatever is predicted
    stale_ns: int = NEVER_NS  # if stage 0 begins later it cannot make it

    def plan(self, forecast: Forecast, policy: Policy) -> None:
        """Work out the order anew: predictions changed."""
        decode = forecast.decode_ns(self.decode_units)
        self.remaining_ns = forecast.forward_ns(self.units, 1) * self.left + decode
        context = self.work.context
        self.fresh_ns = self.remaining_ns
        if context:
            plain = self.units * self.work.frames // (self.work.frames + context)
            self.fresh_ns = forecast.forward_ns(plain, 1) * self.left + decode
        # A window that runs along once may make its block late; it must not have every block dropped instead.
        self.stale_ns = self.expires_ns - (0 if self.probes else self.fresh_ns)
        work = self.work
        order = policy.order(work, self.remaining_ns) - self.aged_ns
        self.key = (order, work.stream, work.stamps[0].chunk)

    def keeps(self, begin_ns: int, items: int, forecast: Forecast) -> bool:
        """Whether it still makes its deadline in a batch of ``items``, or had lost it anyway."""
        deadline = self.work.deadline_ns
        if not deadline or begin_ns + self.remaining_ns > deadline:
            return True
        together = forecast.forward_ns(self.units, items) * self.left + forecast.decode_ns(self.decode_units)
        return begin_ns + together * forecast.margin <= deadline

    def waits(self, begin_ns: int, delay_ns: int) -> bool:
        """Whether it still makes its deadline after ``delay_ns``, or had lost it anyway."""
        deadline, finish = self.work.deadline_ns, begin_ns + self.remaining_ns
        return not deadline or finish > deadline or finish + delay_ns <= deadline


def choose(
    ordered: Sequence[Ready],
    begin_ns: int,
    forecast: Forecast,
    policy: Policy,
    max_items: int,
    live_about: bool = False,
) -> list[Ready]:
    """The members of the next batch; the first of ``ordered`` leads it. Empty when there is none.

    ``begin_ns`` is when stage 0 can begin with it. A stream joins at most once per slot: the caller offers no two works of
    the same slot. With ``live_about`` a lossless batch stays short: a live chunk may come any moment.
    """
    if not ordered:
        return []
    leader = ordered[0]
    batch = [leader]
    if len(ordered) == 1:
        return batch
    if policy.growth is not Growth.DEADLINES:
        own = leader.work.stream if policy.growth is Growth.OWN else None
        for ready in ordered:
            if len(batch) >= max_items:
                break
            if ready is not leader and ready.bucket == leader.bucket and own in (None, ready.work.stream):
                batch.append(ready)
        return batch
    bucket, units = leader.bucket, leader.units
    other = next((ready for ready in ordered if ready.bucket != bucket and ready.work.deadline_ns), None)
    short = live_about and not leader.work.deadline_ns
    tried = 1
    for ready in ordered:
        items = len(batch) + 1
        if items > max_items:
            break
        if ready is leader or ready.bucket != bucket:
            continue
        if items > tried:  # what a batch of this many does to those that are in, and to those that cannot be
            tried = items
            takes = forecast.slowest_ns(units, items)
            if not forecast.gains(units, items) or (short and takes > LOSSLESS_BATCH_NS):
                break
            if not all(member.keeps(begin_ns, items, forecast) for member in batch):
                break
            if other is not None and not other.waits(begin_ns, takes):
                break
        if ready.keeps(begin_ns, items, forecast):
            batch.append(ready)
    return batch


class LosslessShare:
    """What live batches owe the lossless work that waited for them: at least ``share`` of the pipeline's time is its own.

    Between two lossless batches, while some lossless work waits, live ones take at most (1 − share) / share of the time of
    the lossless item that is next, and one batch more.
    """

    def __init__(self, share: float = LOSSLESS_SHARE) -> None:
        self._rate = share / (1.0 - share)
        self._owed_ns = 0.0

    def first(self, ordered: Sequence[Ready], forecast: Forecast) -> Sequence[Ready]:
        """The same, with the oldest lossless work in front when it is owed its time."""
        if not ordered or not ordered[0].work.deadline_ns or ordered[-1].work.deadline_ns:
            return ordered  # it is first anyway, or there is none
        oldest = next(ready for ready in ordered if not ready.work.deadline_ns)
        if self._owed_ns < max(forecast.slowest_ns(oldest.units, 1), MIN_COST_NS):
            return ordered
        return [oldest, *(ready for ready in ordered if ready is not oldest)]

    def sent(self, batch: Sequence[Ready], lossless_waits: bool, forecast: Forecast) -> None:
        """A batch left; ``lossless_waits``: some lossless work stayed behind."""
        if not lossless_waits and not self._owed_ns:
            return
        takes = max(forecast.slowest_ns(batch[0].units, len(batch)), MIN_COST_NS)
        lossless = sum(not ready.work.deadline_ns for ready in batch)
        if lossless:
            self._owed_ns = max(0.0, self._owed_ns - takes * lossless / len(batch))
        elif lossless_waits:
            self._owed_ns += takes * self._rate
        else:
            self._owed_ns = 0.0
