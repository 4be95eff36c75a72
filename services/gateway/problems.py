"""Errors as ``application/problem+json`` (RFC 9457): what is wrong, and what would be accepted."""

from __future__ import annotations

import http
import logging
import math
import re
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from shared.bus.port import BusError
from shared.contracts.views import Problem
from shared.session.port import StoreError

log = logging.getLogger(__name__)
MEDIA_TYPE = "application/problem+json"


class GatewayError(Exception):
    """Base of what the gateway answers with an error; the message is the problem's detail, for the client."""

    status = 500
    title = "Failed"
    headers: Mapping[str, str] = {}

    def more(self) -> dict[str, Any]:
        """Further members of the problem; ``retry_after_s`` becomes a header, too."""
        return {}


def problem(status: int, title: str, detail: str, **more: Any) -> JSONResponse:
    """An error response; what is None is left out. ``retry_after_s`` is told in whole seconds."""
    body = Problem(title=title, status=status, detail=detail, **more)
    answer = JSONResponse(body.model_dump(mode="json", exclude_none=True), status_code=status, media_type=MEDIA_TYPE)
    if body.retry_after_s is not None:
        answer.headers["Retry-After"] = str(max(1, math.ceil(body.retry_after_s)))
    return answer


def responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """For the OpenAPI: these errors, beside those that any request may get."""
    schema = {"schema": {"$ref": "#/components/schemas/Problem"}}
    return {
        status: {"description": http.HTTPStatus(status).phrase, "content": {MEDIA_TYPE: schema}}
        for status in sorted({400, 401, 403, 405, 413, 421, 422, 429, 503, *statuses})
    }


PROBLEM_RESPONSES = responses(404, 409)


def methods_of(schema: Mapping[str, Any], path: str) -> list[str]:
    """The methods that the OpenAPI has for a path."""
    found: set[str] = set()
    for template, verbs in schema["paths"].items():
        pattern = "".join(part if n % 2 == 0 else "[^/]+" for n, part in enumerate(_split(template)))
        if re.fullmatch(pattern, path):
            found |= {verb.upper() for verb in verbs}
    return sorted(found)


def _split(template: str) -> list[str]:
    """A path template's plain parts, escaped, and its parameters in turn."""
    return [re.escape(part) if n % 2 == 0 else part for n, part in enumerate(re.split(r"\{(\w+)\}", template))]


def _complaints(errors: Any) -> str:
    said: list[str] = []
    for error in errors:
        place = ".".join(str(part) for part in error["loc"] if part not in ("body", "query", "path"))
        said.append(f"{place}: {error['msg']}" if place else str(error["msg"]))
    return "; ".join(said)[:2000]


def install(app: FastAPI) -> None:
    """Map the gateway's errors to responses."""

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        return problem(422, "Invalid request", _complaints(error.errors()))

    @app.exception_handler(ValidationError)
    async def invalid_spec(_: Request, error: ValidationError) -> JSONResponse:
        return problem(422, "Invalid stream", _complaints(error.errors()))

    @app.exception_handler(GatewayError)
    async def ours(_: Request, error: GatewayError) -> JSONResponse:
        answer = problem(error.status, error.title, str(error), **error.more())
        answer.headers.update(error.headers)
        return answer

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        if error.status_code == 204:
            return Response(status_code=204)
        answer = problem(error.status_code, "HTTP error", str(error.detail))
        answer.headers.update(error.headers or {})
        if error.status_code == 405 and (allowed := methods_of(request.app.openapi(), request.url.path)):
            answer.headers["Allow"] = ", ".join(allowed)  # the framework names those of one route only
        return answer

    @app.exception_handler(BusError)
    @app.exception_handler(StoreError)
    async def away(_: Request, error: Exception) -> JSONResponse:
        log.warning("an answer fails: %s", error)
        return problem(
            503, "No answer", "the broker or the session store does not answer: try again", retry_after_s=2.0
        )

    @app.exception_handler(Exception)
    async def fault(_: Request, error: Exception) -> JSONResponse:
        """Starlette logs it; the client learns nothing of our insides."""
        return problem(500, "Failed", "the gateway failed to answer; its log says why")
