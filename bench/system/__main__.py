"""``python -m bench.system WHAT``: the whole system measured. Every figure names the machine; run it when that is quiet."""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Callable
from typing import Any

from bench.system.arrivals import arrivals
from bench.system.batching import batching
from bench.system.capacity import OPEN, PIN, capacity
from bench.system.cores import cores
from bench.system.driver import machine
from bench.system.latency import latency
from bench.system.ratio import ratio
from bench.system.stall import stall
from bench.system.straggler import straggler
from bench.system.tenants import tenants

SMALL = ((160, 96), 8.0, 2, 1000)  # capturing a chunk alone takes 375 ms at 8 fps
USUAL = ((320, 192), 16.0, 2, 600)


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.partition("x")
    try:
        return int(width), int(height)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no size: write WIDTHxHEIGHT, e.g. 320x192") from None


def _command(
    commands: Any, name: str, help_: str, defaults: tuple[tuple[int, int], float, int, int], *, nats: bool = False
) -> argparse.ArgumentParser:
    """A subcommand with a stream's settings."""
    parser: argparse.ArgumentParser = commands.add_parser(name, help=help_)
    size, fps, steps, deadline_ms = defaults
    parser.add_argument("--size", type=_size, default=size, help=f"default {size[0]}x{size[1]}")
    parser.add_argument("--fps", type=float, default=fps)
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--deadline-ms", type=int, default=deadline_ms)
    parser.add_argument("--json", action="store_true", help="one JSON object")
    if nats:
        parser.add_argument("--nats", default="", help="a system that is up already, by its NATS URL")
    return parser


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.system", description=__doc__)
    commands = parser.add_subparsers(dest="what", required=True)
    command = commands.add_parser("ratio", help="the system beside the engine alone")
    command.add_argument("--seconds", type=float, default=60.0, help="length of the clip")
    command.add_argument("--steps", type=int, default=2)
    command.add_argument("--json", action="store_true")
    command = _command(commands, "latency", "latency, jitter, first frame; where the time goes", USUAL, nats=True)
    command.add_argument("--seconds", type=float, default=60.0)
    command.add_argument("--streams", type=int, default=1)
    _command(commands, "stall", "a worker stopped for 1 s and for 5 s", USUAL)
    command = _command(commands, "arrivals", "open-loop arrivals of streams", SMALL, nats=True)
    command.add_argument("--seconds", type=float, default=120.0)
    command.add_argument("--every", type=float, default=4.0, help="mean seconds between two arrivals")
    command.add_argument("--stays", type=float, default=20.0, help="mean seconds that a stream stays")
    command.add_argument("--seed", type=int, default=1)
    command = _command(commands, "capacity", "capacity by bisection beside what is promised", SMALL)
    command.add_argument("--seconds", type=float, default=20.0, help="of each try")
    command.add_argument("--hold", type=float, default=120.0, help="how long the admitted streams are held")
    command.add_argument("--only", choices=("all", "bisect", "promise"), default="all")
    command.add_argument(
        "--start", type=int, default=0, help="streams to begin the search with (default: what is let in)"
    )
    command = _command(commands, "cores", "where the cores' time goes", SMALL)
    command.add_argument("--seconds", type=float, default=20.0)
    command.add_argument("--streams", type=int, default=6)
    command = _command(commands, "batching", "batches across streams against one per stream", SMALL)
    command.add_argument("--seconds", type=float, default=30.0)
    command.add_argument("--streams", type=int, default=4)
    command = _command(commands, "straggler", "a worker of two that is held up, and what is not to be moved", USUAL)
    command.add_argument(
        "--runs", type=int, default=4, help="systems with a worker that is held up, one after the other"
    )
    command.add_argument("--quiet", type=float, default=60.0, help="seconds of a light load, and of an even one")
    command = _command(commands, "tenants", "a flooding tenant beside a quiet one", SMALL)
    command.add_argument("--seconds", type=float, default=20.0, help="of each phase")
    command.add_argument("--rounds", type=int, default=3, help="of a calm phase and one with a flood")
    command.add_argument("--requests", type=int, default=100, help="in each flood")
    return parser


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """Run what was asked for."""
    if given.what == "ratio":
        return ratio(given.seconds, given.steps)
    width, height = given.size
    fields: dict[str, Any] = {
        "width": width,
        "height": height,
        "fps": given.fps,
        "steps": given.steps,
        "deadline_ms": given.deadline_ms,
    }
    runs: dict[str, Callable[[], Any]] = {
        "latency": lambda: latency(seconds=given.seconds, streams=given.streams, nats=given.nats, **fields),
        "stall": lambda: stall(**fields),
        "arrivals": lambda: arrivals(
            seconds=given.seconds,
            every_s=given.every,
            stays_s=given.stays,
            seed=given.seed,
            nats=given.nats,
            fields=fields,
        ),
        "capacity": lambda: capacity(
            seconds=given.seconds, hold_s=given.hold, only=given.only, start=given.start, fields=fields
        ),
        "cores": lambda: cores(
            seconds=given.seconds, streams=given.streams, fields={**fields, **PIN, "min_fps": given.fps}, env=OPEN
        ),
        "batching": lambda: batching(seconds=given.seconds, streams=given.streams, fields=fields),
        "straggler": lambda: straggler(runs=given.runs, quiet_s=given.quiet, fields=fields),
        "tenants": lambda: tenants(seconds=given.seconds, requests=given.requests, rounds=given.rounds, fields=fields),
    }
    return asyncio.run(runs[given.what]())


def main() -> None:
    """Print the figures."""
    given = arguments().parse_args()
    figures = {"what": given.what, "machine": machine(), **measure(given)}
    if given.json:
        print(json.dumps(figures))
    else:
        _show(figures)


def _show(figures: dict[str, Any], indent: str = "") -> None:
    """Figures for people: one line each, nested ones indented."""
    for name, value in figures.items():
        if isinstance(value, dict) and value:
            print(f"{indent}{name}:")
            _show(value, indent + "  ")
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            for index, row in enumerate(value):
                print(f"{indent}{name} {index}:")
                _show(row, indent + "  ")
        else:
            print(f"{indent}{name}: {value}")


if __name__ == "__main__":
    main()
