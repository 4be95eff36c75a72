"""``python -m services.scheduler.simulator``: what ``rheocast simulate`` launches. The result on stdout, the rest on stderr."""

from __future__ import annotations

import argparse
import json
import sys
import time

from services.scheduler.policies import POLICIES
from services.scheduler.simulator.report import lines
from services.scheduler.simulator.run import simulate
from services.scheduler.simulator.scenario import Scenario, ScenarioError, load_scenario, parse_scenario, shipped

OK, REFUSED, INTERRUPTED = 0, 2, 130
EVERY_S = 5.0


class Progress:
    """A line that is written over on a terminal, a line every five seconds elsewhere."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._began = self._said = time.monotonic()
        self._terminal = sys.stderr.isatty()

    def __call__(self, done_s: float) -> None:
        """So many seconds have been simulated."""
        now = time.monotonic()
        if now - self._said < (0.2 if self._terminal else EVERY_S):
            return
        self._said = now
        left = (now - self._began) / done_s * (self._seconds - done_s)
        text = f"{done_s:.0f} of {self._seconds:g} s simulated, {left:.0f} s left"
        sys.stderr.write(f"\r{text:<60}" if self._terminal else text + "\n")
        sys.stderr.flush()

    def close(self) -> None:
        """Leave the terminal's line empty."""
        if self._terminal:
            sys.stderr.write("\r" + " " * 60 + "\r")


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0; 2 for what cannot be run, told in one line."""
    parser = argparse.ArgumentParser(prog="rheocast simulate", description=__doc__)
    parser.add_argument("--scenario", default="steady_095")
    parser.add_argument("--policy", choices=sorted(POLICIES), default="slack")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--list", action="store_true", dest="listed")
    parser.add_argument("--json", action="store_true", dest="as_json")
    asked = parser.parse_args(arguments)
    try:
        if asked.listed:
            titles = shipped()
            text = json.dumps(titles) if asked.as_json else "\n".join(f"{name:<14} {titles[name]}" for name in titles)
            sys.stdout.write(text + "\n")
            return OK
        scenario = _changed(load_scenario(asked.scenario), asked.seed, asked.seconds)
    except ScenarioError as error:
        sys.stderr.write(f"rheocast: error: {' '.join(str(error).split())}\n")
        return REFUSED
    progress = None if asked.as_json else Progress(scenario.seconds)
    try:
        result = simulate(asked.scenario, scenario, POLICIES[asked.policy], progress)
    except KeyboardInterrupt:
        return INTERRUPTED
    finally:
        if progress is not None:
            progress.close()
    sys.stdout.write((json.dumps(result) if asked.as_json else "\n".join(lines(result))) + "\n")
    return OK


def _changed(scenario: Scenario, seed: int | None, seconds: float | None) -> Scenario:
    plain = scenario.model_dump(mode="json")
    if seed is not None:
        plain["seed"] = seed
    if seconds is not None:
        plain["seconds"] = seconds
    return parse_scenario(plain)


if __name__ == "__main__":
    sys.exit(main())
