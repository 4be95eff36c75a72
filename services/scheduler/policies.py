"""Policies: who goes first, who may share its forward, and whether what comes too late is dropped. Pure.

The service runs ``slack``. The others are what it is compared with, by the simulator, in the same core:

* ``slack``: least slack first; a batch grows while it gains and every member keeps its deadline; stale chunks are dropped;
* ``edf``: the same with the earliest deadline first, whatever work is left;
* ``fifo``: in order of arrival, one stream's steps in a forward, nothing is dropped: a stream batch without a scheduler;
* ``maxbatch``: in order of arrival, every forward as full as it can be, nothing is dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType

from services.scheduler.stream_queue import Work

LOSSLESS_ORDER_NS = 1 << 62


class Growth(StrEnum):
    """Whose items may join a forward."""

    DEADLINES = "deadlines"  # whoever gains by it, while every member keeps its deadline
    OWN = "own"  # those of the stream that goes first
    FULL = "full"  # whoever fits


@dataclass(frozen=True, slots=True)
class Policy:
    """``order(work, remaining_ns)``: smaller goes first; it must not depend on the time, so that it is worked out once."""

    name: str
    order: Callable[[Work, int], int]
    growth: Growth
    drops_stale: bool


def _slack(work: Work, remaining_ns: int) -> int:
    """Slack but for the time, which is the same for all. Lossless work has no deadline: oldest first, after live."""
    return work.deadline_ns - remaining_ns if work.deadline_ns else LOSSLESS_ORDER_NS + work.ready_ns


def _deadline(work: Work, remaining_ns: int) -> int:
    del remaining_ns
    return work.deadline_ns or LOSSLESS_ORDER_NS + work.ready_ns


def _arrival(work: Work, remaining_ns: int) -> int:
    del remaining_ns
    return work.ready_ns


SLACK = Policy("slack", _slack, Growth.DEADLINES, drops_stale=True)
POLICIES: Mapping[str, Policy] = MappingProxyType(
    {
        policy.name: policy
        for policy in (
            SLACK,
            Policy("edf", _deadline, Growth.DEADLINES, drops_stale=True),
            Policy("fifo", _arrival, Growth.OWN, drops_stale=False),
            Policy("maxbatch", _arrival, Growth.FULL, drops_stale=False),
        )
    }
)
