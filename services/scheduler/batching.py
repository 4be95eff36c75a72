"""Which items share the next forward: least slack first, grown while every member keeps its deadline."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

from services.scheduler.stream_queue import Work

LOSSLESS_SLACK_NS = 1 << 62


class Predictor(Protocol):
    """Predicted remaining nanoseconds until a work's last step is decoded, if ``items`` items share its forwards."""

    def __call__(self, work: Work, items: int) -> int: ...


def slack_ns(work: Work, now_ns: int, remaining_ns: int) -> int:
    """Playout time minus now minus predicted remaining work. Lossless work has no deadline: oldest first, after live."""
    if work.deadline_ns == 0:
        return LOSSLESS_SLACK_NS + work.ready_ns
    return work.deadline_ns - now_ns - remaining_ns


def choose(
    candidates: Iterable[Work],
    now_ns: int,
    remaining: Predictor,
    bucket: Callable[[Work], tuple[int, ...]],
    max_items: int,
) -> list[Work]:
    """The members of the next batch, least slack first; empty when there are no candidates.

    Only work of one bucket (T and size) can share a forward. Another member joins if, with the batch one larger, no
    member that would have kept its deadline misses it. A stream joins at most once per step: the caller offers no two
    works of the same slot.
    """
    order = sorted(candidates, key=lambda work: (slack_ns(work, now_ns, remaining(work, 1)), work.stream))
    if not order:
        return []
    batch = [order[0]]
    wanted = bucket(order[0])
    for work in order[1:]:
        if len(batch) >= max_items:
            break
        if bucket(work) != wanted:
            continue
        grown = [*batch, work]
        if all(_keeps(member, now_ns, remaining, len(grown)) for member in grown):
            batch = grown
    return batch


def _keeps(work: Work, now_ns: int, remaining: Predictor, items: int) -> bool:
    """Whether a member still makes its deadline in a batch of ``items``, or had lost it anyway."""
    if work.deadline_ns == 0:
        return True
    alone = slack_ns(work, now_ns, remaining(work, 1))
    return alone < 0 or slack_ns(work, now_ns, remaining(work, items)) >= 0
