"""One request to a running system's API, for commands that are not the system themselves."""

from __future__ import annotations

import json
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from services.cli.errors import CommandError, ExitCode

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
