"""A simulation's result: plain values, the same for machines and people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from services.scheduler.policies import Policy
from services.scheduler.simulator.measures import share_below
from services.scheduler.simulator.scenario import Scenario
from services.scheduler.simulator.sessions import Session
from services.scheduler.simulator.world import Starts, World


def report(name: str, scenario: Scenario, policy: Policy, world: World, cpu_s: float) -> dict[str, Any]:
    """Everything that was measured.

    ``cpr``: the share of play time in which no picture stood for too long, as egress measures it. ``on_time`` is of the
    frames that were due: neither skipped nor left out by a lower rate.
    """
    ledger, counts = world.ledger, world.counts
    due = sum(session.due for session in world.sessions)
    plays = [session.play() for session in world.sessions if session.due]
    each = [1.0 - stood / span for span, stood in plays if span]
    never = sum(session.first_shown_ns < 0 for session in world.sessions if session.due)
    dropped = sum(ledger.dropped.values())
    busy = [ns / (scenario.seconds * 1e9) for ns in world.busy_ns]
    batches = sum(pipeline.batches for pipeline in world.fleet.pipelines)
    items = sum(pipeline.items for pipeline in world.fleet.pipelines)
    events = sorted([burst.at_s + burst.seconds for burst in scenario.bursts] + [f.at_s for f in scenario.faults])
    return {
        "scenario": name,
        "policy": policy.name,
        "seed": scenario.seed,
        "seconds": scenario.seconds,
        "workers": len(world.fleet.workers),
        "fits": round(world.fleet.streams, 2),
        "sessions": _starts(counts.starts.values()),
        "cpr": _cpr(world.sessions),
        "cpr_worst_1pct": round(share_below(each, 0.01), 5) if each else 1.0,
        "sessions_never_shown": never,
        "first_frame_ms": _percentiles(ledger.first_frame, (0.5, 0.95, 0.99)),
        "latency_ms": _percentiles(ledger.latency, (0.5, 0.95, 0.99)),
        "on_time": round(ledger.on_time / due, 5) if due else 1.0,
        "tenants": {tenant: _tenant(world, tenant) for tenant in sorted(counts.starts)},
        "frames": {
            "in": ledger.frames_in,
            "on_time": ledger.on_time,
            "late": ledger.late,
            "dropped": dict(sorted(ledger.dropped.items())),
            "reconciles": ledger.frames_in == ledger.on_time + ledger.late + dropped,
        },
        "tier_changes": counts.tier_changes,
        "rebalanced": [{"at_s": at, "pipeline": name, "cuts": list(cuts)} for at, name, cuts in counts.recut],
        "lost_workers": counts.lost_workers,
        "streams_moved": counts.moved,
        "most_gaps": max((session.gaps() for session in world.sessions), default=0),
        "recovered_s": {f"{at:g}": world.ledger.timeline.right_again(at) for at in events},
        "utilisation": {"mean": round(sum(busy) / len(busy), 3), "busiest": round(max(busy), 3)} if busy else {},
        "items_per_batch": round(items / batches, 2) if batches else 0.0,
        "events": world.events,
        "cpu_s": round(cpu_s, 2),
    }


def lines(result: dict[str, Any]) -> list[str]:
    """The result for people."""
    first, latency, frames = result["first_frame_ms"], result["latency_ms"], result["frames"]
    sessions = result["sessions"]
    refused = sum(sessions["refused"].values())
    found = [
        f"{result['scenario']}, {result['policy']}: {result['seconds']:g} s with {result['workers']} workers, "
        f"room for {result['fits']:g} streams",
        f"sessions: {sessions['asked']} asked, {sessions['admitted']} admitted, {refused} refused",
        f"continuous play {result['cpr']:.4f} (worst 1 % of sessions {result['cpr_worst_1pct']:.4f}), "
        f"{result['on_time']:.2%} of frames on time",
        f"first frame p50 {first['p50']:g} ms, p99 {first['p99']:g} ms; "
        f"latency p50 {latency['p50']:g} ms, p95 {latency['p95']:g} ms, p99 {latency['p99']:g} ms",
        f"frames: {frames['in']} in, {frames['on_time']} on time, {frames['late']} late, "
        f"dropped {frames['dropped'] or 'none'}; the ledger {'reconciles' if frames['reconciles'] else 'DOES NOT reconcile'}",
        f"workers busy {result['utilisation'].get('mean', 0):.0%}, the busiest {result['utilisation'].get('busiest', 0):.0%}; "
        f"{result['items_per_batch']:g} items a batch; {result['tier_changes']} tier changes",
    ]
    for tenant, told in result["tenants"].items() if len(result["tenants"]) > 1 else ():
        starts, late = told["sessions"], told["latency_ms"]
        found.append(
            f"tenant {tenant}: {starts['asked']} asked, {starts['admitted']} admitted; continuous play {told['cpr']:.4f}, "
            f"latency p50 {late['p50']:g} ms, p95 {late['p95']:g} ms, p99 {late['p99']:g} ms"
        )
    for move in result["rebalanced"]:
        found.append(f"re-balanced {move['pipeline']} at {move['at_s']:g} s: cuts {move['cuts']}")
    for at, seconds in result["recovered_s"].items():
        found.append(
            f"after {at} s: " + (f"right again in {seconds:.2f} s" if seconds is not None else "never right again")
        )
    if result["lost_workers"]:
        found.append(
            f"{result['lost_workers']} workers lost, {result['streams_moved']} streams moved, "
            f"{result['most_gaps']} gaps at most in a stream"
        )
    found.append(f"{result['events']} events in {result['cpu_s']:.1f} s of CPU")
    return found


def _starts(starts: Iterable[Starts]) -> dict[str, Any]:
    every, refused = list(starts), Counter[str]()
    for each in every:
        refused.update(each.refused)
    asked, admitted = sum(each.asked for each in every), sum(each.admitted for each in every)
    return {"asked": asked, "admitted": admitted, "refused": dict(refused)}


def _cpr(sessions: Iterable[Session]) -> float:
    plays = [session.play() for session in sessions if session.due]
    played, stalled = sum(span for span, _ in plays), sum(stood for _, stood in plays)
    return round(1.0 - stalled / played, 5) if played else 1.0


def _tenant(world: World, tenant: str) -> dict[str, Any]:
    """What one tenant's requests and viewers met."""
    shown = world.ledger.of(tenant)
    return {
        "sessions": _starts([world.counts.starts[tenant]]),
        "cpr": _cpr(session for session in world.sessions if session.tenant == tenant),
        "first_frame_ms": _percentiles(shown.first_frame, (0.5, 0.95, 0.99)),
        "latency_ms": _percentiles(shown.latency, (0.5, 0.95, 0.99)),
    }


def _percentiles(histogram: Any, shares: tuple[float, ...]) -> dict[str, float]:
    return {f"p{share * 100:g}": histogram.percentile(share) for share in shares}
