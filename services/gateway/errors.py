"""What the gateway may answer instead of what was asked for; see ``problems.py`` for how it is told."""

from __future__ import annotations

import math
from typing import Any

from services.gateway.problems import GatewayError
from shared.contracts.tiers import Refusal, Tier


class RefusedError(GatewayError):
    """A command was refused; the message is the reason. ``retry_after_s`` above 0: not now, maybe later.

    ``tier`` would be accepted now (None: nothing would, or it is no question of that).
    """

    def __init__(
        self,
        reason: str,
        retry_after_s: float = 0.0,
        refusal: Refusal = Refusal.OTHER,
        tier: Tier | None = None,
    ) -> None:
        super().__init__(reason)
        self.retry_after_s, self.refusal, self.tier = retry_after_s, refusal, tier
        self.status, self.title = 409, "Refused"
        if retry_after_s > 0:
            quota = refusal is Refusal.QUOTA
            self.status, self.title = (429, "Too much") if quota else (503, "Not now")

    def more(self) -> dict[str, Any]:
        """When and what would do."""
        if self.retry_after_s <= 0:
            return {}
        wait_s = max(1, math.ceil(self.retry_after_s))
        return {"refusal": self.refusal, "retry_after_s": wait_s, "tier": self.tier}


class NoAnswerError(GatewayError):
    """The scheduler, or a store, did not answer in time."""

    status, title = 503, "No answer"


class UnknownStreamError(GatewayError):
    """No such stream, or none that the caller may see."""

    status, title = 404, "No such stream"


class UnknownPartError(GatewayError):
    """Something else is not there: a worker, a file, a sink."""

    status, title = 404, "Not found"


class InvalidError(GatewayError):
    """What was asked for cannot be; the message says what can."""

    status, title = 422, "Invalid request"


class ConflictError(GatewayError):
    """It cannot be done as things stand; the message says what to do first."""

    status, title = 409, "Refused"


class TooLargeError(GatewayError):
    """More bytes than may come."""

    status, title = 413, "Too large"


class SlowError(GatewayError):
    """What the client sends does not come; its connection is of no further use."""

    status, title, headers = 408, "Too slow", {"Connection": "close"}


class ForbiddenError(GatewayError):
    """The caller is known and may not do this; the message says what would."""

    status, title = 403, "Not allowed"


class BusyError(GatewayError):
    """Too many do this at once."""

    status, title = 429, "Too much"

    def more(self) -> dict[str, Any]:
        """Viewers come and go."""
        return {"retry_after_s": 2.0}
