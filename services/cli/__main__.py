"""``rheocast``: the entry point. The commands are in :mod:`services.cli.commands`, whose imports take a moment."""

from __future__ import annotations

import sys

from services.cli.errors import ExitCode
from services.cli.interrupts import HeldInterrupt


def main() -> None:
    """Run the command line; ends the process with its exit code."""
    with HeldInterrupt() as held:
        from services.cli.commands import run_command_line
    if held.noted:
        sys.exit(int(ExitCode.INTERRUPTED))
    run_command_line()


if __name__ == "__main__":
    main()
