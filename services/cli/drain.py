"""``rheocast drain``: empties a worker over the API of a running system, and says when it may be stopped."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import quote, urlencode
from urllib.request import Request, urlopen

from services.cli.errors import CommandError, ExitCode

POLL_S = 1.0
ANSWER_S = 10.0


def call(api: str, method: str, path: str, token: str = "") -> dict[str, Any]:
    """One request to the gateway. Raises CommandError with what it says is wrong."""
    if not api.startswith(("http://", "https://")):
        raise CommandError(f"{api!r} is no API: give its address, e.g. http://127.0.0.1:7860")
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    request = Request(f"{api.rstrip('/')}{path}", method=method, headers=headers)  # noqa: S310 - http(s) only, see above
    try:
        with urlopen(request, timeout=ANSWER_S) as response:  # noqa: S310
            found: dict[str, Any] = json.load(response)
            return found
    except HTTPError as error:
        raise CommandError(_detail(error), ExitCode.REFUSED if error.code < 500 else ExitCode.FAILED) from None
    except (URLError, TimeoutError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise CommandError(f"no Rheocast answers at {api}: {reason}; is it running? (rheocast up)") from None


def _detail(error: HTTPError) -> str:
    try:
        return str(json.load(error)["detail"])
    except (ValueError, KeyError, TypeError):
        return f"{error.code} {error.reason}"


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
