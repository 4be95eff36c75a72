"""The quality ladder over simulated streams: what egress would tell goes in, tiers come out and are bound as the service does.

See ``services/scheduler/tiering.py``: steps and T are bound with the next block that enters, a lower rate goes to the source.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from services.scheduler.ladder import Ladder, Wish
from services.scheduler.pricing import Demand, Shape
from services.scheduler.simulator.clock import NS_PER_MS, NS_PER_S
from services.scheduler.simulator.pipelines import SimPipeline
from services.scheduler.simulator.sessions import Session
from services.scheduler.stream_queue import Change, StreamSettings

if TYPE_CHECKING:
    from services.scheduler.simulator.world import World

EVERY_NS = 200 * NS_PER_MS  # as the service does
MANY = 64
EVERY_OF_MANY_NS = NS_PER_S  # in a fleet of more pipelines: asking is most of what an idle one costs


class Tiers:
    """One ladder per pipeline."""

    def __init__(self, world: World, shape: Shape) -> None:
        self._world = world
        self._wish = Wish(asked=world.demand)
        self._ladders = {p.name: Ladder(shape, p.core.cost) for p in world.fleet.pipelines}
        self._seen: dict[str, tuple[int, int]] = {}
        self._told = 0
        many = len(self._ladders) > MANY
        self._every_ns = EVERY_OF_MANY_NS if many else EVERY_NS

    def begin(self) -> None:
        """The ladders are asked from now on, one after the other."""
        count = len(self._ladders)
        for number, pipeline in enumerate(self._world.fleet.pipelines):
            pipeline.clock.at(self._every_ns * (number + 1) // count, self._ask, pipeline)

    def settings(self, session: Session, pipeline: SimPipeline, tier: Demand | None) -> StreamSettings:
        """The session is on this pipeline's ladder now. Returns what its blocks are bound to; ``tier``: it had one."""
        self._ladders[pipeline.name].join(session.name, self._wish, tier or self._wish.asked)
        self._seen[session.name] = _verdicts(session)
        return _settings(tier or self._wish.asked)

    def leave(self, session: Session, pipeline: SimPipeline) -> Demand | None:
        """The session is gone from here. Returns the tier that it had."""
        ladder = self._ladders[pipeline.name]
        tier = ladder.tier(session.name)
        ladder.leave(session.name)
        self._seen.pop(session.name, None)
        return tier

    def degraded(self, pipeline: SimPipeline) -> bool:
        """Whether a session on it runs with less than it asks for."""
        return self._ladders[pipeline.name].degraded

    def _ask(self, pipeline: SimPipeline) -> None:
        now_s = pipeline.clock.now / NS_PER_S
        ladder = self._ladders[pipeline.name]
        for name, session in pipeline.sessions.items():
            verdicts, before = _verdicts(session), self._seen[name]
            if verdicts != before:
                self._seen[name] = verdicts
                ladder.closed(name, verdicts[0] - before[0], verdicts[1] - before[1], now_s)
        for change in ladder.decide(now_s):
            session = pipeline.sessions[change.stream]
            self._told += 1
            pipeline.core.streams[change.stream].change(f"tier:{self._told}", Change(_settings(change.tier)))
            session.pace(change.tier.fps)
            self._world.counts.tier_changes += 1
        if not self._world.over:
            pipeline.clock.at(pipeline.clock.now + self._every_ns, self._ask, pipeline)


def _verdicts(session: Session) -> tuple[int, int]:
    """(frames with a verdict, of those missed for want of time)."""
    missed = session.late + session.dropped_frames - session.faulted
    return session.on_time + missed, missed


def _settings(tier: Demand) -> StreamSettings:
    return StreamSettings(steps=tier.steps, seed=0, prompt_version=1, frames_per_block=tier.frames_per_block)
