"""Open streams at fixed times, whatever the answers (open loop), and tell how they were served.

CPR is the continuous play ratio: the share of a stream's play time without a stall. A stream that is refused is not
tried again: the share of refusals is a result, too. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from dataclasses import dataclass

from shared.client import Api, ApiError, UnreachableError
from shared.contracts.commands import StreamSpec
from shared.contracts.events import LedgerTotals, StreamStats
from shared.contracts.sources import PatternSource


@dataclass(slots=True)
class Outcome:
    """What became of one stream; ``stats`` and ``ledger`` are None when it was not let in."""

    name: str
    said: str
    stats: StreamStats | None = None
    ledger: LedgerTotals | None = None


async def one(api: Api, spec: StreamSpec, number: int, options: argparse.Namespace) -> Outcome:
    """One stream, started at its time."""
    await asyncio.sleep(number * options.every)
    name = f"{options.name}-{number}"
    try:
        view = await api.start(spec, name)
        await asyncio.sleep(options.seconds)
        await api.stop(view.id)
        view = await api.ended(view.id)
    except (ApiError, UnreachableError) as error:
        return Outcome(name, str(error))
    return Outcome(name, view.reason or view.state, view.stats, view.ledger)


def row(outcome: Outcome) -> str:
    stats, ledger = outcome.stats, outcome.ledger
    if stats is None or ledger is None:
        return f"{outcome.name:<12} {outcome.said}"
    shares = f"{ledger.on_time}/{ledger.late}/{ledger.dropped_total}/{ledger.skipped}"
    return (
        f"{outcome.name:<12} {stats.cpr:6.3f} {stats.fps:6.1f} {stats.first_frame_ms:8.0f} {stats.latency_p50_ms:7.0f} "
        f"{stats.latency_p95_ms:7.0f}  {shares}"
    )


def summary(outcomes: list[Outcome]) -> dict[str, object]:
    """Over all streams; the worst one is what a user remembers."""
    played = [outcome.stats for outcome in outcomes if outcome.stats is not None]
    told: dict[str, object] = {"streams": len(outcomes), "served": len(played), "refused": len(outcomes) - len(played)}
    if played:
        told["cpr_mean"] = round(sum(stats.cpr for stats in played) / len(played), 4)
        told["cpr_worst"] = round(min(stats.cpr for stats in played), 4)
        told["latency_p50_ms"] = round(sorted(stats.latency_p50_ms for stats in played)[len(played) // 2], 1)
        told["latency_p95_worst_ms"] = round(max(stats.latency_p95_ms for stats in played), 1)
        told["balanced"] = all(each.ledger.closed == each.ledger.frames_in for each in outcomes if each.ledger)
    return told


async def load(options: argparse.Namespace) -> None:
    width, _, height = options.size.partition("x")
    spec = StreamSpec(
        source=PatternSource(look="scene"),
        model=options.model,
        prompt=options.prompt,
        width=int(width),
        height=int(height),
        fps=options.fps,
        steps=options.steps,
        deadline_ms=options.deadline_ms,
    )
    async with Api(options.api, options.token) as api:
        outcomes = await asyncio.gather(*(one(api, spec, number, options) for number in range(options.streams)))
    print(
        f"{'stream':<12} {'CPR':>6} {'fps':>6} {'first ms':>8} {'p50 ms':>7} {'p95 ms':>7}  on time/late/dropped/skipped"
    )
    print("\n".join(map(row, outcomes)))
    print(json.dumps(summary(outcomes)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--every", type=float, default=1.0, help="seconds from one start to the next")
    parser.add_argument("--seconds", type=float, default=10, help="how long each one plays")
    parser.add_argument("--size", default="160x96", metavar="WxH", help="multiples of 16")
    parser.add_argument("--fps", type=float, default=8)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--deadline-ms", type=int, default=1000, help="from a frame's capture to when it is shown")
    parser.add_argument("--model", default="rheo-tiny", help="one that a worker serves")
    parser.add_argument("--prompt", default="a pencil drawing")
    parser.add_argument("--name", default="load", help="what their ids begin with")
    parser.add_argument("--api", default="http://127.0.0.1:7860")
    parser.add_argument("--token")
    asyncio.run(load(parser.parse_args()))


if __name__ == "__main__":
    main()
