"""Run one scenario under one policy."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any

from services.scheduler.policies import Policy
from services.scheduler.simulator.report import report
from services.scheduler.simulator.scenario import Scenario
from services.scheduler.simulator.world import World


def simulate(
    name: str, scenario: Scenario, policy: Policy, progress: Callable[[float], None] | None = None
) -> dict[str, Any]:
    """The result, as :mod:`services.scheduler.simulator.report` has it."""
    world, cpu_s = run_world(scenario, policy, progress)
    return report(name, scenario, policy, world, cpu_s)


def run_world(
    scenario: Scenario, policy: Policy, progress: Callable[[float], None] | None = None
) -> tuple[World, float]:
    """The world after its last verdict, and the CPU seconds that it took."""
    began = time.process_time()
    world = World(scenario, policy)
    # Nothing here makes cycles that matter, and walking through millions of live objects again and again costs a third.
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        world.run(progress)
    finally:
        gc.enable()
        gc.unfreeze()
    return world, time.process_time() - began
