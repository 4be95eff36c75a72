"""A simulation: sessions come and go, are let in or refused, placed, moved. Every decision is the service's own code."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from heapq import heappop, heappush

from services.scheduler.admission import Admission, Admitted, Rules
from services.scheduler.placement import choose_pipeline
from services.scheduler.policies import SLACK, Policy
from services.scheduler.pricing import Demand, Shape
from services.scheduler.quotas import Tenants
from services.scheduler.settled import Settled
from services.scheduler.simulator.clock import NS_PER_MS, NS_PER_S, VirtualClock
from services.scheduler.simulator.fleet_sim import build_fleet
from services.scheduler.simulator.guards import Guards
from services.scheduler.simulator.pipelines import SimPipeline
from services.scheduler.simulator.scenario import Scenario
from services.scheduler.simulator.sessions import CHUNK_FRAMES, Ledger, Session
from services.scheduler.simulator.tiers import Tiers
from services.scheduler.simulator.trace import Arrival, arrivals
from services.scheduler.stream_queue import StreamQueue, StreamSettings
from shared.engine.plan.stream_plan import StreamPlan

DRAIN_S = 120.0  # for what is under way when the time is over; a backlog may be long
MOST_CANDIDATES = 8
TICK_NS = 250 * NS_PER_MS


@dataclass(slots=True)
class Starts:
    """What became of requests for sessions; refusals by reason."""

    asked: int = 0
    admitted: int = 0
    refused: dict[str, int] = field(default_factory=dict[str, int])

    def refuse(self, why: str) -> None:
        """One was refused."""
        self.refused[why] = self.refused.get(why, 0) + 1


@dataclass(slots=True)
class Counts:
    """What happened to sessions, by tenant, and to pipelines."""

    starts: dict[str, Starts] = field(default_factory=dict[str, Starts])
    tier_changes: int = 0
    moved: int = 0
    recut: list[tuple[float, str, tuple[int, ...]]] = field(default_factory=list[tuple[float, str, tuple[int, ...]]])
    lost_workers: int = 0


class World:
    """One scenario under one policy."""

    def __init__(self, scenario: Scenario, policy: Policy) -> None:
        self.scenario, self.policy = scenario, policy
        self.clock = VirtualClock()
        self.ledger = Ledger(scenario.seconds + DRAIN_S)
        self.counts = Counts()
        self.fleet = build_fleet(scenario, policy, self.clock)
        self.pipelines = {pipeline.name: pipeline for pipeline in self.fleet.pipelines}
        self._clocks: dict[int, tuple[VirtualClock, list[SimPipeline]]] = {}  # each with whose it is
        for pipeline in self.fleet.pipelines:
            self._clocks.setdefault(id(pipeline.clock), (pipeline.clock, []))[1].append(pipeline)
        self._asked = 0
        self.sessions: list[Session] = []
        self.homeless: list[Session] = []
        self.over = False
        self.busy_ns: list[int] = []
        fleet, streams = scenario.fleet, scenario.streams
        self._spec = self.fleet.pipelines[0].spec
        self.demand = Demand(
            width=fleet.width, height=fleet.height, tokens=self.fleet.pipelines[0].tokens, fps=streams.fps,
            steps=streams.steps, deadline_ms=float(streams.deadline_ms), min_steps=streams.min_steps,
            min_fps=streams.least_fps,
        )  # fmt: skip
        rules = scenario.admission
        # Only the scheduler itself has admission, the ladder and re-balancing: the others take whoever comes.
        self.governed = policy is SLACK and rules.enabled
        self.admission = Admission(
            Rules(target=rules.target, max_streams=rules.max_streams), Tenants(special=dict(scenario.tenants))
        )
        self._by_load: list[tuple[float, str]] = []
        self.repriced = set(self.pipelines)  # whose loads in admission's books are others since it was last asked for
        shape = Shape(fleet.stages, 0, fleet.stages - 1, fleet.max_batch)
        for pipeline in self.fleet.pipelines:
            self.admission.pipeline(pipeline.name, shape, Settled(pipeline.core.cost))
            pipeline.left = self._left
        self.tiers = Tiers(self, shape) if policy is SLACK and scenario.ladder else None
        self._tier_of: dict[str, Demand] = {}  # of sessions that are between two pipelines
        self.streams_on = dict.fromkeys(self.pipelines, 0.0)
        self.guards = Guards(self)
        wanted = float(streams.count) if streams.count else streams.load * self.fleet.streams
        self.trace = arrivals(scenario, wanted)

    # --- running -----------------------------------------------------------------------------------------------------

    def run(self, progress: Callable[[float], None] | None = None) -> None:
        """Until everything that was captured has its verdict. ``progress`` is told the simulated seconds, once each."""
        clock = self.clock
        for arrival in self.trace:
            clock.at(int(arrival.at_s * NS_PER_S), self._arrive, arrival)
        self.guards.begin()
        if self.tiers is not None:
            self.tiers.begin()
        for one_clock, pipelines in self._clocks.values():
            one_clock.at(TICK_NS, self._tick, pipelines)
        end = int(self.scenario.seconds * NS_PER_S)
        while clock.now < end:
            clock.run(min(clock.now + NS_PER_S, end))
            self.sync()
            if progress is not None:
                progress(clock.now / NS_PER_S)
        self.over = True
        self.busy_ns = [worker.busy_ns for worker in self.fleet.workers]
        for session in self.sessions:
            session.stop()
        while any(session.open for session in self.sessions) and clock.now < end + DRAIN_S * NS_PER_S:
            clock.run(clock.now + NS_PER_S)
            self.sync()

    def sync(self, names: Iterable[str] | None = None) -> None:
        """Pipelines (None: all) with a clock of their own come up to now: to be called before they are looked at."""
        for pipeline in self.fleet.pipelines if names is None else map(self.pipelines.__getitem__, names):
            if pipeline.clock is not self.clock:
                pipeline.clock.run(self.clock.now)

    @property
    def events(self) -> int:
        """How many have happened."""
        clocks = {id(self.clock): self.clock, **{at: clock for at, (clock, _) in self._clocks.items()}}
        return sum(clock.events for clock in clocks.values())

    def _tick(self, pipelines: list[SimPipeline]) -> None:
        """The service's own: what can no longer make it is dropped even when nothing else happens."""
        for pipeline in pipelines:
            if pipeline.sessions:
                pipeline.pump()
        if not self.over:
            clock = pipelines[0].clock
            clock.at(clock.now + TICK_NS, self._tick, pipelines)

    # --- sessions ----------------------------------------------------------------------------------------------------

    def _arrive(self, arrival: Arrival) -> None:
        streams, tenant = self.scenario.streams, arrival.tenant
        name = f"s{self._asked}"
        self._asked += 1
        starts = self.counts.starts.setdefault(tenant, Starts())
        starts.asked += 1
        now_s = self.clock.now / NS_PER_S
        if self.governed:
            candidates = self._least_loaded()
            self.sync(candidates)
            decided = self.admission.admit(name, tenant, self.demand, candidates, now_s)
            if not isinstance(decided, Admitted):
                starts.refuse(decided.refusal.value or "other")
                return
            target = decided.pipeline
            self.repriced.add(target)
        else:
            chosen = choose_pipeline({name: self.streams_on[name] for name in self._open_pipelines()})
            if chosen is None:
                starts.refuse("no_pipeline")
                return
            target = chosen
            self.sync((target,))
        starts.admitted += 1
        pipeline = self.pipelines[target]
        end_s = min(arrival.at_s + arrival.life_s, self.scenario.seconds)
        chunk_s = CHUNK_FRAMES / streams.fps
        credits = max(2, math.ceil(streams.deadline_ms / 1000.0 / chunk_s) + 1)
        session = Session(
            name, pipeline.clock, self.ledger, streams.fps, streams.deadline_ms * NS_PER_MS, credits,
            int(end_s * NS_PER_S), tenant,
        )  # fmt: skip
        self.sessions.append(session)
        self.seat(session, pipeline)
        pipeline.clock.at(self.clock.now + int(streams.open_ms * NS_PER_MS), self._begin, session)

    def _begin(self, session: Session) -> None:
        session.begin(session.clock.now)

    def _open_pipelines(self) -> list[str]:
        return [name for name in self.pipelines if name not in self.guards.down]

    def _least_loaded(self) -> list[str]:
        """Admission takes the least loaded of those that can: of alike pipelines no other would be chosen.

        Kept as a heap of (load, name); an entry whose load is not the pipeline's any more is dropped when it comes up.
        """
        loads, down, heap = self.admission.loads, self.guards.down, self._by_load
        for name in self.repriced:
            heappush(heap, (loads[name], name))
        self.repriced.clear()
        found: list[str] = []
        passed: list[tuple[float, str]] = []
        while heap and len(found) < MOST_CANDIDATES:
            entry = heappop(heap)
            load, name = entry
            if loads[name] != load or (passed and passed[-1] == entry):
                continue
            passed.append(entry)
            if name not in down:
                found.append(name)
        for entry in passed:
            heappush(heap, entry)
        return found

    def seat(self, session: Session, pipeline: SimPipeline) -> None:
        """The session's queue is on this pipeline from now on, its slots empty."""
        fleet, streams = self.scenario.fleet, self.scenario.streams
        settings = StreamSettings(steps=streams.steps, seed=0, prompt_version=1)
        if self.tiers is not None:
            settings = self.tiers.settings(session, pipeline, self._tier_of.pop(session.name, None))
        pipeline.core.add(
            StreamQueue(
                stream=session.name, epoch=session.epoch, live=True, height=fleet.height, width=fleet.width,
                model=self._spec, plan=StreamPlan.for_model(session.name, session.epoch, self._spec),
                settings=settings,
            )
        )  # fmt: skip
        pipeline.take(session)
        self.streams_on[pipeline.name] += 1

    def _left(self, session: Session) -> None:
        if session.pipeline is not None:
            self.streams_on[session.pipeline.name] -= 1
            tier = self.tiers.leave(session, session.pipeline) if self.tiers is not None else None
            if tier is not None and not session.ended:
                self._tier_of[session.name] = tier
        if session.ended and self.governed:
            self.admission.leave(session.name, session.clock.now / NS_PER_S)
            self.repriced.update(self.pipelines if session.pipeline is None else (session.pipeline.name,))
