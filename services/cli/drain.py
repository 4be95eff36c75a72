"""``rheocast drain``: empties a worker over the API of a running system, and says when it may be stopped."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any
from urllib.parse import quote, urlencode

from services.cli.calling import call

POLL_S = 1.0


def drain(
    api: str,
    worker: str,
    *,
    force: bool = False,
    undo: bool = False,
    wait: bool = True,
    token: str = "",
    say: Callable[[str], None],
    sleep: Callable[[float], None] = time.sleep,
) -> dict[str, Any]:
    """Empty a worker and wait until it may be stopped; ``undo`` takes it back. Returns the worker as the API shows it."""
    path = f"/v1/workers/{quote(worker, safe='')}"
    if undo:
        return call(api, "DELETE", f"{path}/drain", token)
    view, told = call(api, "POST", f"{path}/drain?{urlencode({'force': str(force).lower()})}", token), ""
    while wait and view["state"] == "draining":
        line = _progress(view)
        if line != told:
            say(line)
            told = line
        sleep(POLL_S)
        view = call(api, "GET", path, token)
    return view


def _progress(view: dict[str, Any]) -> str:
    left, stuck = view["streams"], view["stuck"]
    line = f"{view['instance']}: {len(left)} streams are still on it"
    if stuck:
        stream, why = next(iter(sorted(stuck.items())))
        line += f"; {len(stuck)} found no other place ({stream}: {why}): --force ends them"
    return line
