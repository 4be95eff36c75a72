"""``rheocast simulate``: the simulation is the scheduler's (ADR 16); it is launched as a process, like every service."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

MODULE = "services.scheduler.simulator"


def launch(arguments: Sequence[str]) -> int:
    """Run it on this terminal's stdout and stderr; the exit code, 130 when it was interrupted."""
    process = subprocess.Popen([sys.executable, "-m", MODULE, *arguments])
    try:
        return process.wait()
    except KeyboardInterrupt:
        process.wait(timeout=10)  # the terminal interrupted it as well
        return 130
