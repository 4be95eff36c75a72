"""Who comes when, and stays how long: drawn once from the seed, the same for every policy."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from services.scheduler.simulator.scenario import Burst, Flood, Scenario

ALWAYS_S = 1e9
REPLACED_S = 1.0  # until another session takes the place of one that left: its last chunks are shown by then


@dataclass(frozen=True, slots=True)
class Arrival:
    """A session is asked for at ``at_s`` by ``tenant`` and stays for ``life_s``. ``burst``: it belongs to one."""

    at_s: float
    life_s: float
    burst: bool = False
    tenant: str = "default"


def arrivals(scenario: Scenario, wanted: float) -> list[Arrival]:
    """All sessions of a run that has ``wanted`` at once in the mean, in the order they come."""
    rng = random.Random(scenario.seed)
    streams, seconds = scenario.streams, scenario.seconds
    found: list[Arrival] = []
    if streams.poisson:
        # Those that are there from the beginning are met in the middle of their lives: the exponential forgets.
        for _ in range(round(wanted)):
            found.append(Arrival(rng.uniform(0, streams.ramp_s), rng.expovariate(1 / streams.lifetime_s)))
        at = streams.ramp_s
        while (at := at + rng.expovariate(wanted / streams.lifetime_s)) < seconds:
            found.append(Arrival(at, rng.expovariate(1 / streams.lifetime_s)))
    else:
        idle = REPLACED_S / streams.lifetime_s if streams.lifetime_s else 0.0
        for _ in range(round(wanted * (1.0 + idle))):
            at = rng.uniform(0, streams.ramp_s)
            while at < seconds:
                life = rng.expovariate(1 / streams.lifetime_s) if streams.lifetime_s else ALWAYS_S
                found.append(Arrival(at, life))
                at += life + REPLACED_S
    for burst in scenario.bursts:
        found.extend(_burst(rng, burst, wanted))
    if streams.tenant != Arrival.tenant:
        found = [replace(arrival, tenant=streams.tenant) for arrival in found]
    for flood in scenario.floods:  # last: the others are the same with and without it
        found.extend(_flood(rng, flood))
    return sorted(found, key=lambda arrival: arrival.at_s)


def _burst(rng: random.Random, burst: Burst, wanted: float) -> list[Arrival]:
    """All of them within a fifth of the burst's time, and until its end."""
    more = round(wanted * (burst.factor - 1))
    starts = [burst.at_s + rng.uniform(0, burst.seconds / 5) for _ in range(more)]
    return [Arrival(at, burst.at_s + burst.seconds - at, burst=True) for at in starts]


def _flood(rng: random.Random, flood: Flood) -> list[Arrival]:
    return [
        Arrival(flood.at_s + rng.uniform(0, flood.seconds), ALWAYS_S, tenant=flood.tenant)
        for _ in range(flood.requests)
    ]
