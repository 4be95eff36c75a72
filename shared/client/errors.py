"""What a client may be told instead of what it asked for. Every message says what would do."""

from __future__ import annotations

from shared.contracts.tiers import Refusal, Tier
from shared.contracts.views import Problem


class ClientError(Exception):
    """Base of all of these."""


class UnreachableError(ClientError):
    """Nobody answers at this address, or not in time."""


class ApiError(ClientError):
    """The API answered with a problem; ``problem`` is all of it."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(f"{problem.title}: {problem.detail}")
        self.problem = problem

    @property
    def status(self) -> int:
        """The HTTP status."""
        return self.problem.status


class InvalidError(ApiError):
    """422, 400, 413, 421: the request will never do as it is."""


class NoAccessError(ApiError):
    """401, 403: no token, an unknown one, or one of a lesser role."""


class NotFoundError(ApiError):
    """404: no such stream, command or file, or none that this token may see."""


class ConflictError(ApiError):
    """409: it cannot be done as things stand."""


class NotNowError(ApiError):
    """429, 503: there is no room, or too much was asked for. The same may be accepted after ``retry_after_s``."""

    @property
    def retry_after_s(self) -> float:
        """When to try again."""
        return self.problem.retry_after_s or 1.0

    @property
    def refusal(self) -> Refusal:
        """Why."""
        return self.problem.refusal or Refusal.OTHER

    @property
    def tier(self) -> Tier | None:
        """What would be let in now; None: nothing, or it is no question of that."""
        return self.problem.tier


_BY_STATUS: dict[int, type[ApiError]] = {
    400: InvalidError,
    401: NoAccessError,
    403: NoAccessError,
    404: NotFoundError,
    409: ConflictError,
    413: InvalidError,
    421: InvalidError,
    422: InvalidError,
    429: NotNowError,
    503: NotNowError,
}


def error_of(problem: Problem) -> ApiError:
    """The error for a problem."""
    return _BY_STATUS.get(problem.status, ApiError)(problem)
