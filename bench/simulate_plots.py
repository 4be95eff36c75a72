"""Figures and tables of docs/scheduler.md, by simulation: ``python -m bench.simulate_plots [--out docs/figures]``.

Writes ``cpr-by-load.svg`` and ``latency-by-load.svg`` (every policy, the same traces, loads from a half to three times what
fits), and prints the table of all scenarios by policy as Markdown. Virtual time: the figures do not depend on the machine.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.scheduler.policies import POLICIES
from services.scheduler.simulator.run import simulate
from services.scheduler.simulator.scenario import Scenario, load_scenario, parse_scenario

LOADS = (0.5, 0.7, 0.8, 0.9, 0.95, 1.0, 1.1, 1.25, 1.5, 2.0, 2.5, 3.0)
ORDER = ("slack", "edf", "maxbatch", "fifo")
COLOURS = {"slack": "#0b7a4b", "edf": "#2b5fb3", "maxbatch": "#b06a00", "fifo": "#b3261e"}
TABLE = ("steady_095", "overload_2x", "rush_2x", "burst_3x", "straggler", "worker_loss")
WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 640, 360, 60, 30, 110, 45


@dataclass(frozen=True, slots=True)
class Axis:
    """Values from ``low`` to ``high`` on a side of the picture."""

    label: str
    low: float
    high: float
    ticks: tuple[float, ...]


def at_load(load: float) -> Scenario:
    """Random arrivals at this load, everybody let in: what the policy and the ladder make of it."""
    plain = load_scenario("overload_2x").model_dump(mode="json")
    plain["seconds"] = 40.0
    plain["streams"]["load"] = load
    return parse_scenario(plain)


def chart(
    title: str, x: Axis, y: Axis, lines: dict[str, Sequence[tuple[float, float]]], mark: float | None = None
) -> str:
    """A line chart as SVG; ``mark`` is a dashed level."""

    def px(value: float) -> float:
        return LEFT + (value - x.low) / (x.high - x.low) * (WIDTH - LEFT - RIGHT)

    def py(value: float) -> float:
        inside = min(max(value, y.low), y.high)
        return HEIGHT - BOTTOM - (inside - y.low) / (y.high - y.low) * (HEIGHT - TOP - BOTTOM)

    text = 'font-family="sans-serif" font-size="12" fill="#333"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
        f'<text x="{LEFT}" y="18" {text} font-weight="bold">{title}</text>',
    ]
    for tick in x.ticks:
        parts.append(
            f'<line x1="{px(tick):.1f}" y1="{TOP}" x2="{px(tick):.1f}" y2="{HEIGHT - BOTTOM}" stroke="#e4e4e4"/>'
        )
        parts.append(f'<text x="{px(tick):.1f}" y="{HEIGHT - BOTTOM + 16}" {text} text-anchor="middle">{tick:g}</text>')
    for tick in y.ticks:
        parts.append(
            f'<line x1="{LEFT}" y1="{py(tick):.1f}" x2="{WIDTH - RIGHT}" y2="{py(tick):.1f}" stroke="#e4e4e4"/>'
        )
        parts.append(f'<text x="{LEFT - 6}" y="{py(tick) + 4:.1f}" {text} text-anchor="end">{tick:g}</text>')
    if mark is not None:
        level = f'y1="{py(mark):.1f}" x2="{WIDTH - RIGHT}" y2="{py(mark):.1f}"'
        parts.append(f'<line x1="{LEFT}" {level} stroke="#777" stroke-dasharray="5 4"/>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 8}" {text} text-anchor="middle">{x.label}</text>')
    parts.append(
        f'<text x="14" y="{HEIGHT / 2}" {text} text-anchor="middle" transform="rotate(-90 14 {HEIGHT / 2})">{y.label}</text>'
    )
    for row, (name, points) in enumerate(lines.items()):
        path = " ".join(f"{px(a):.1f},{py(b):.1f}" for a, b in points)
        colour, key_y = COLOURS[name], TOP + 14 + 20 * row
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{px(a):.1f}" cy="{py(b):.1f}" r="2.5" fill="{colour}"/>' for a, b in points]
        key_x = WIDTH - RIGHT + 12
        parts.append(
            f'<line x1="{key_x}" y1="{key_y - 4}" x2="{key_x + 18}" y2="{key_y - 4}" stroke="{colour}" stroke-width="3"/>'
        )
        parts.append(f'<text x="{key_x + 24}" y="{key_y}" {text}>{name}</text>')
    return "\n".join([*parts, "</svg>", ""])


def plots(out: Path) -> None:
    """Both charts."""
    cpr: dict[str, Sequence[tuple[float, float]]] = {}
    late: dict[str, Sequence[tuple[float, float]]] = {}
    for name in ORDER:
        results = [(load, simulate(f"load {load:g}", at_load(load), POLICIES[name])) for load in LOADS]
        cpr[name] = [(load, result["cpr"]) for load, result in results]
        late[name] = [(load, result["latency_ms"]["p99"]) for load, result in results]
        sys.stderr.write(f"{name}: {[(load, value) for load, value in cpr[name]]}\n")
    x = Axis("load (1: what fits in the steady state)", 0.5, 3.0, (0.5, 1.0, 1.5, 2.0, 2.5, 3.0))
    out.mkdir(parents=True, exist_ok=True)
    share = Axis("continuous play ratio", 0.0, 1.0, (0.0, 0.25, 0.5, 0.75, 0.95))
    ms = Axis("ms, shown − captured", 0.0, 5000.0, (0, 1000, 2000, 3000, 4000, 5000))
    (out / "cpr-by-load.svg").write_text(chart("Continuous play by load", x, share, cpr, 0.95), encoding="utf-8")
    (out / "latency-by-load.svg").write_text(
        chart("p99 latency of shown frames by load (deadline 1000 ms)", x, ms, late, 1000.0), encoding="utf-8"
    )


def table() -> list[str]:
    """All scenarios by policy, as Markdown."""
    lines = [
        "| scenario | policy | CPR | on time | first frame p99 | latency p50 / p99 | refused | tiers changed | right again |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for scenario in TABLE:
        for policy in ORDER:
            lines.append(_row(simulate(scenario, load_scenario(scenario), POLICIES[policy])))
    return lines


def _row(result: dict[str, Any]) -> str:
    latency, sessions = result["latency_ms"], result["sessions"]
    again: dict[str, float | None] = result["recovered_s"]
    told = ", ".join("never" if seconds is None else f"{seconds:g} s" for seconds in again.values()) or "–"
    refused = sum(sessions["refused"].values())
    cells = (
        result["scenario"],
        result["policy"],
        f"{result['cpr']:.4f}",
        f"{result['on_time']:.2%}",
        f"{result['first_frame_ms']['p99']:g} ms",
        f"{latency['p50']:g} / {latency['p99']:g} ms",
        f"{refused} of {sessions['asked']}",
        f"{result['tier_changes']}",
        told,
    )
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Both charts, then the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/figures"))
    parser.add_argument("--no-plots", action="store_true")
    asked = parser.parse_args()
    if not asked.no_plots:
        plots(asked.out)
    print("\n".join(table()))


if __name__ == "__main__":
    main()
