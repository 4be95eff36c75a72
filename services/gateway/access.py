"""What a route asks of its caller: a role, and that the stream is there for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

from fastapi import Depends, Header, Path, Security
from fastapi.security import HTTPBearer
from starlette.requests import HTTPConnection

from services.gateway.auth import Caller
from services.gateway.errors import ForbiddenError, UnknownStreamError
from services.gateway.handlers import Desk
from shared.access import Role
from shared.contracts.tiers import DEFAULT_TENANT, TENANT_PATTERN
from shared.contracts.views import StreamView

TENANT_HEADER = "X-Rheocast-Tenant"
STREAM_PATTERN = r"^[A-Za-z0-9_-]{1,64}$"


class _Bearer(HTTPBearer):
    """For the OpenAPI: the guard has looked at the token already."""

    async def __call__(self, request: HTTPConnection) -> None:  # type: ignore[override]
        """Nothing is left to do."""


_bearer = _Bearer(auto_error=False, description="A token made by `rheocast token`; none is needed on loopback.")

StreamId = Annotated[str, Path(pattern=STREAM_PATTERN, description="The stream's id.", examples=["s-3f9a0c1d2e4b"])]


def caller_of(connection: HTTPConnection, _: Annotated[None, Security(_bearer)] = None) -> Caller:
    """Who asks; the guard found out. Raises ForbiddenError on a path that the guard lets anybody in to."""
    caller: Caller | None = getattr(connection.state, "caller", None)
    if caller is None:
        raise ForbiddenError("a token is needed here")
    return caller


Who = Annotated[Caller, Depends(caller_of)]


def needs(role: Role) -> Callable[[Caller], Caller]:
    """A dependency: the caller has at least this role. Share links see their stream and nothing else."""

    def check(caller: Who) -> Caller:
        if not caller.role.covers(role):
            raise ForbiddenError(f"this takes the role {role}; yours is {caller.role}")
        return caller

    return check


def not_shared(caller: Who) -> Caller:
    """A dependency of what is not about one stream. Raises ForbiddenError for share links."""
    if caller.stream:
        raise ForbiddenError(f"this link shows stream {caller.stream} and nothing else")
    return caller


Viewer = Annotated[Caller, Depends(not_shared)]
Operator = Annotated[Caller, Depends(needs(Role.OPERATOR))]
Admin = Annotated[Caller, Depends(needs(Role.ADMIN))]


def tenant_of(
    caller: Who,
    tenant: Annotated[
        str | None,
        Header(
            alias=TENANT_HEADER,
            pattern=TENANT_PATTERN,
            description="Whose request this is: quotas, rates and fair turns are by tenant. A token's tenant is its own; "
            "an admin's token, and who needs none, may act for any.",
        ),
    ] = None,
) -> str:
    """For whom the caller acts. Raises ForbiddenError when it is not its own tenant."""
    if caller.open:
        return tenant or DEFAULT_TENANT
    if tenant is not None and tenant != caller.tenant and caller.role is not Role.ADMIN:
        raise ForbiddenError(f"your token is of tenant {caller.tenant}: leave {TENANT_HEADER} out")
    return tenant or caller.tenant


Tenant = Annotated[str, Depends(tenant_of)]


class Seen:
    """Finds streams for callers: another tenant's stream is not there for them."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    async def __call__(self, stream: StreamId, caller: Who) -> StreamView:
        """A dependency: the stream as it is. Raises UnknownStreamError."""
        view = await self._desk.view(stream)
        if not caller.may_see(stream, view.tenant):
            raise UnknownStreamError(f"there is no stream {stream}")
        return view

    async def change(self, stream: StreamId, caller: Operator) -> StreamView:
        """A dependency: the stream, for one who may change it. Raises UnknownStreamError, ForbiddenError."""
        return await self(stream, caller)
