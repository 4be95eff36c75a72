"""Errors as ``application/problem+json`` (RFC 9457): what is wrong, and what would be accepted."""

from __future__ import annotations

import math
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException

from services.gateway.core import PathRefusedError
from services.gateway.handlers import InvalidError, NoAnswerError, RefusedError, UnknownPartError, UnknownStreamError
from shared.contracts.tiers import Refusal, Tier

MEDIA_TYPE = "application/problem+json"


class Problem(BaseModel):
    """The body of every error. A refused start may name in ``tier`` what would be accepted now."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str
    refusal: Refusal | None = None
    retry_after_s: float | None = None
    tier: Tier | None = None


def problem(status: int, title: str, detail: str, **more: Any) -> JSONResponse:
    """An error response; what is None is left out."""
    body = Problem(title=title, status=status, detail=detail, **more)
    return JSONResponse(body.model_dump(mode="json", exclude_none=True), status_code=status, media_type=MEDIA_TYPE)


PROBLEM_RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"model": Problem, "content": {MEDIA_TYPE: {}}} for status in (404, 409, 413, 422, 429, 503)
}


def _complaints(errors: Any) -> str:
    said: list[str] = []
    for error in errors:
        place = ".".join(str(part) for part in error["loc"] if part not in ("body", "query", "path"))
        said.append(f"{place}: {error['msg']}" if place else str(error["msg"]))
    return "; ".join(said)


def install(app: FastAPI) -> None:
    """Map the gateway's errors to responses."""

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        return problem(422, "Invalid request", _complaints(error.errors()))

    @app.exception_handler(ValidationError)
    async def invalid_spec(_: Request, error: ValidationError) -> JSONResponse:
        return problem(422, "Invalid stream", _complaints(error.errors()))

    @app.exception_handler(PathRefusedError)
    async def path(_: Request, error: PathRefusedError) -> JSONResponse:
        return problem(422, "Path refused", str(error))

    @app.exception_handler(UnknownStreamError)
    async def unknown(_: Request, error: UnknownStreamError) -> JSONResponse:
        return problem(404, "No such stream", str(error.args[0]))

    @app.exception_handler(UnknownPartError)
    async def unknown_part(_: Request, error: UnknownPartError) -> JSONResponse:
        return problem(404, "No such worker or pipeline", str(error.args[0]))

    @app.exception_handler(InvalidError)
    async def cannot_be(_: Request, error: InvalidError) -> JSONResponse:
        return problem(422, "Invalid request", str(error))

    @app.exception_handler(RefusedError)
    async def refused(_: Request, error: RefusedError) -> JSONResponse:
        if error.retry_after_s <= 0:
            return problem(409, "Refused", str(error))
        quota = error.refusal is Refusal.QUOTA
        wait_s = max(1, math.ceil(error.retry_after_s))
        more: dict[str, Any] = {"refusal": error.refusal, "retry_after_s": wait_s, "tier": error.tier}
        later = problem(429 if quota else 503, "Too much" if quota else "Not now", str(error), **more)
        later.headers["Retry-After"] = str(wait_s)
        return later

    @app.exception_handler(NoAnswerError)
    async def silent(_: Request, error: NoAnswerError) -> JSONResponse:
        return problem(503, "No answer", str(error))

    @app.exception_handler(HTTPException)
    async def http(_: Request, error: HTTPException) -> JSONResponse:
        return problem(error.status_code, "HTTP error", str(error.detail))
