"""The simulated fleet: its pipelines with their first cuts, and what it can do in all."""

from __future__ import annotations

from dataclasses import dataclass

from services.scheduler.core import PipelineCore
from services.scheduler.cost_model import CostModel
from services.scheduler.placement import WorkerCost, best_cuts, stage_costs
from services.scheduler.policies import Policy
from services.scheduler.simulator.clock import VirtualClock
from services.scheduler.simulator.pipelines import SimPipeline
from services.scheduler.simulator.scenario import Scenario
from services.scheduler.simulator.workers import NOISE_VALUES, Worker, noise_table
from shared.engine.plan.devices import device_profile
from shared.engine.plan.registry import model_spec
from shared.engine.plan.spec import FRAMES_PER_LATENT


@dataclass(slots=True)
class SimFleet:
    """``streams`` is how many sessions of the scenario's kind all pipelines can carry, in the steady state."""

    pipelines: list[SimPipeline]
    streams: float

    @property
    def workers(self) -> list[Worker]:
        """All of them."""
        return [worker for pipeline in self.pipelines for worker in pipeline.workers]


MANY = 64


def build_fleet(scenario: Scenario, policy: Policy, clock: VirtualClock) -> SimFleet:
    """The pipelines of a scenario, calibrated as workers are when they join.

    Many that have nothing to do with each other have a clock each (see :meth:`World.sync`), which is the same and costs less:
    running one pipeline for a while finds what it needs in the processor's caches.
    """
    wanted, streams = scenario.fleet, scenario.streams
    spec = model_spec(wanted.model)
    device = device_profile(wanted.device)
    times = device.times(spec, wanted.width, wanted.height)
    tokens = spec.tokens(wanted.width, wanted.height)
    per_block = times.block_fixed_ms + times.block_ms * streams.steps
    costs = [
        WorkerCost(
            per_block,
            (times.encode_ms if stage == 0 else 0.0) + (times.decode_ms if stage == wanted.stages - 1 else 0.0),
        )
        for stage in range(wanted.stages)
    ]
    cuts = best_cuts(costs, spec.layers)
    slowest_ms = max(stage_costs(cuts, costs, spec.layers))
    noise = noise_table(scenario.seed, wanted.noise, wanted.outlier_share, wanted.outlier_factor)
    pipelines: list[SimPipeline] = []
    for number in range(wanted.pipelines):
        name = f"p{number:04d}"
        own = VirtualClock() if apart(scenario) else clock
        core = PipelineCore(name, wanted.stages, 1, CostModel(), wanted.max_batch, policy=policy)
        # Workers walk through the same noise from places far apart.
        workers = [
            Worker(f"{name}-w{stage}", own, noise, (number * wanted.stages + stage) * 389 % NOISE_VALUES)
            for stage in range(wanted.stages)
        ]
        pipeline = SimPipeline(core, own, workers, times, cuts, spec, tokens, device.hop_ms)
        pipeline.calibrate()
        pipelines.append(pipeline)
    per_pipeline = 1000.0 / slowest_ms * FRAMES_PER_LATENT / streams.fps * device.system_share
    return SimFleet(pipelines, per_pipeline * wanted.pipelines)


def apart(scenario: Scenario) -> bool:
    """Whether what happens on one pipeline never touches another: nothing fails, moves or makes room for others."""
    streams = scenario.streams
    stays = not (streams.poisson or streams.lifetime_s or scenario.bursts or scenario.floods)
    return scenario.fleet.pipelines > MANY and scenario.fleet.stages == 1 and stays and not scenario.faults
