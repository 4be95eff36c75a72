"""What watches over a simulated fleet: heartbeats and losses, re-balancing, and the faults that a scenario asks for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from services.scheduler.balancing import Balancer, Proposal, StageMeter
from services.scheduler.fleet import Fleet
from services.scheduler.placement import choose_pipeline
from services.scheduler.policies import SLACK
from services.scheduler.settings import Settings
from services.scheduler.simulator.clock import NS_PER_MS, NS_PER_S
from services.scheduler.simulator.fleet_sim import apart
from services.scheduler.simulator.pipelines import SimPipeline
from services.scheduler.simulator.scenario import Fault, FaultKind
from services.scheduler.simulator.sessions import Session
from services.scheduler.simulator.workers import Rank, Worker
from shared.contracts.events import Beat, ChunkStamp

if TYPE_CHECKING:
    from services.scheduler.simulator.world import World

BEAT_NS = 500 * NS_PER_MS
LOOK_NS = 250 * NS_PER_MS
LOOK_APART_NS = 1000 * NS_PER_MS  # where nothing can fail
BALANCE_NS = 500 * NS_PER_MS


class Guards:
    """The scheduler's fleet and balancers, with simulated beats and measurements."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._clock = world.clock
        self._fleet = Fleet(timeout_s=Settings.model_fields["beat_timeout_s"].default)
        self._home: dict[str, tuple[SimPipeline, int]] = {}
        self._silent_until: dict[str, int] = {}
        self._told: dict[str, tuple[int, Beat]] = {}  # by worker: its incarnation and what it says in it
        self.down: set[str] = set()
        self._balancers: dict[str, Balancer] = {}
        self._meters: dict[str, StageMeter] = {}
        self._moving: dict[str, Proposal] = {}
        self._look_ns = LOOK_APART_NS if apart(world.scenario) else LOOK_NS
        stages = world.scenario.fleet.stages
        for pipeline in world.fleet.pipelines:
            for stage, worker in enumerate(pipeline.workers):
                self._home[worker.name] = (pipeline, stage)
            if stages > 1 and world.policy is SLACK:
                self._balancers[pipeline.name] = Balancer()
                self._meters[pipeline.name] = pipeline.meter = StageMeter()

    def begin(self) -> None:
        """Beats, looks and faults are on the clock from now on."""
        for number, worker in enumerate(self._world.fleet.workers):
            clock = self._home[worker.name][0].clock
            clock.at(number * BEAT_NS // max(1, len(self._home)), self._beat, worker)
        self._clock.at(LOOK_NS, self._look, None)
        if self._balancers:
            self._clock.at(BALANCE_NS, self._balance, None)
        for fault in self._world.scenario.faults:
            self._clock.at(int(fault.at_s * NS_PER_S), self._strike, fault)

    # --- beats and losses --------------------------------------------------------------------------------------------

    def _beat(self, worker: Worker) -> None:
        if self._world.over:
            return
        pipeline, stage = self._home[worker.name]
        now = pipeline.clock.now
        pipeline.clock.at(now + BEAT_NS, self._beat, worker)
        if not worker.alive or self._silent_until.get(worker.name, 0) > now:
            return
        told = self._told.get(worker.name)
        if told is None or told[0] != worker.incarnation:
            beat = Beat(
                service="worker", instance=worker.name, incarnation=str(worker.incarnation), pipeline=pipeline.name,
                stage=stage, stages=pipeline.core.stages, model=pipeline.spec.name,
            )  # fmt: skip
            told = self._told[worker.name] = (worker.incarnation, beat)
        self._fleet.beat(told[1], now / NS_PER_S)
        if stage == 0:
            pipeline.beat()

    def _look(self, _: None) -> None:
        """Who has not been heard of for too long is lost."""
        self._world.sync()
        for name in self._fleet.newly_lost(self._clock.now / NS_PER_S):
            self._world.counts.lost_workers += 1
            self._lost(*self._home[name])
        if not self._world.over:
            self._clock.at(self._clock.now + self._look_ns, self._look, None)

    def _lost(self, pipeline: SimPipeline, stage: int) -> None:
        """The pipeline cannot go on: its streams go to others, or wait until it is back."""
        world = self._world
        self.down.add(pipeline.name)
        pipeline.held = True
        sessions = list(pipeline.sessions.values())
        pipeline.fault(f"{pipeline.workers[stage].name} is lost")
        for session in sessions:
            pipeline.leave(session)
            session.epoch += 1
            for number in list(session.open):  # what the old place still held, in whatever queue
                session.drop(number, "scheduler:pipeline_fault")
            self._place_again(session)
        world.counts.moved += len(sessions)

    def _place_again(self, session: Session) -> None:
        world = self._world
        loads = {name: world.streams_on[name] for name in world.pipelines if name not in self.down}
        chosen = choose_pipeline(loads)
        if chosen is None:
            world.homeless.append(session)
            return
        if world.governed:
            world.admission.move(session.name, chosen)
            world.repriced.update(world.pipelines)
        world.seat(session, world.pipelines[chosen])

    def _back(self, worker: Worker) -> None:
        """A lost worker was started again, empty; streams that waited for it go on."""
        pipeline, _ = self._home[worker.name]
        worker.come_back()
        if all(each.alive for each in pipeline.workers):
            self.down.discard(pipeline.name)
            pipeline.held = False
            homeless, self._world.homeless = self._world.homeless, []
            for session in homeless:
                if session.end_ns > self._clock.now:
                    self._place_again(session)

    # --- faults ------------------------------------------------------------------------------------------------------

    def _strike(self, fault: Fault) -> None:
        pipeline = self._world.fleet.pipelines[fault.pipeline]
        worker = pipeline.workers[fault.stage]
        until = self._clock.now + int(fault.seconds * NS_PER_S)
        if fault.kind is FaultKind.STRAGGLER:
            worker.slow = fault.factor
            if fault.seconds:
                self._clock.at(until, self._recover, worker)
        elif fault.kind is FaultKind.STALL:
            worker.stall(until - self._clock.now)
            self._silent_until[worker.name] = until
        else:
            for rank, what in worker.lose():
                if rank is Rank.ENCODE:
                    self._give_up(pipeline, (what,))
                elif rank is Rank.DECODE:
                    self._give_up(pipeline, what)
            if fault.seconds:
                self._clock.at(until, self._back, worker)

    def _recover(self, worker: Worker) -> None:
        worker.slow = 1.0

    def _give_up(self, pipeline: SimPipeline, stamps: tuple[ChunkStamp, ...]) -> None:
        """Nobody will tell of these chunks."""
        for stamp in stamps:
            session = pipeline.sessions.get(stamp.stream)
            if session is not None:
                session.lose(stamp.chunk, "egress:lost")

    # --- re-balancing ------------------------------------------------------------------------------------------------

    def _balance(self, _: None) -> None:
        now_s = self._clock.now / NS_PER_S
        layers = self._world.fleet.pipelines[0].spec.layers
        pause_s = self._world.scenario.fleet.block_pause_ms / 1000.0
        for name, balancer in self._balancers.items():
            pipeline = self._world.pipelines[name]
            if name in self._moving or name in self.down:
                continue
            workers = self._meters[name].workers(pipeline.cuts, layers, pipeline.core.stages - 1, now_s)
            degraded = self._world.tiers is not None and self._world.tiers.degraded(pipeline)
            proposal = balancer.observe(now_s, workers, pipeline.cuts, layers, pause_s, degraded)
            if proposal is not None:
                self._moving[name] = proposal
                pipeline.held = True
                self._wait_idle(pipeline)
        if not self._world.over:
            self._clock.at(self._clock.now + BALANCE_NS, self._balance, None)

    def _wait_idle(self, pipeline: SimPipeline) -> None:
        """Blocks move when no batch is under way."""
        proposal = self._moving.get(pipeline.name)
        if proposal is None:
            return
        if pipeline.core.in_flight:
            self._clock.at(self._clock.now + NS_PER_MS, self._wait_idle, pipeline)
            return
        pause_ms = proposal.blocks * self._world.scenario.fleet.block_pause_ms
        self._clock.at(self._clock.now + int(pause_ms * NS_PER_MS), self._moved, pipeline)

    def _moved(self, pipeline: SimPipeline) -> None:
        proposal = self._moving.pop(pipeline.name)
        now_s = self._clock.now / NS_PER_S
        before = pipeline.blocks
        pipeline.cut(proposal.cuts)
        for stage, (had, has) in enumerate(zip(before, pipeline.blocks, strict=True)):
            pipeline.core.cost.scale(f"stage.{stage}", has / had)
        self._meters[pipeline.name].cleared(now_s)
        self._balancers[pipeline.name].moved(now_s)
        self._world.counts.recut.append((round(now_s, 3), pipeline.name, proposal.cuts))
        pipeline.held = pipeline.name in self.down
        pipeline.pump()
