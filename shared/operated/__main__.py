"""``python -m shared.operated prepare DIR``, ``… leaf DIR ADDRESS``, ``… nats-users`` or ``… nats-leaf-users``."""

from __future__ import annotations

import sys
from pathlib import Path

from shared.operated.bus_users import leaf_users_conf, users_conf
from shared.operated.prepare import leaf, prepare

USAGE = "usage: python -m shared.operated prepare DIR | leaf DIR ADDRESS | nats-users | nats-leaf-users"


def main(arguments: list[str]) -> int:
    """The exit code: 2 for what is no command, 1 when it could not be done."""
    match arguments:
        case ["prepare", folder]:
            try:
                prepare(Path(folder))
            except (OSError, ValueError) as error:
                sys.stderr.write(f"{error}\n")
                return 1
        case ["leaf", folder, address]:
            try:
                sys.stdout.write(leaf(Path(folder), address))
            except (OSError, ValueError) as error:
                sys.stderr.write(f"{error}\n")
                return 1
        case ["nats-leaf-users"]:
            sys.stdout.write(leaf_users_conf())
        case ["nats-users"]:
            sys.stdout.write(users_conf())
        case _:
            sys.stderr.write(f"{USAGE}\n")
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
