"""WHIP (RFC 9725) and WHEP: ``/v1/streams/{id}/whip|whep``, their sessions, and ``/v1/ice-servers``.

The gateway only carries SDP and candidates; media flows between the client and ingest or egress.
"""

from __future__ import annotations

import time
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Path, Query, Request, Response

from services.gateway.access import Operator, Seen, StreamId, Tenant, Who
from services.gateway.auth import Caller
from services.gateway.core import new_stream_id
from services.gateway.errors import InvalidError
from services.gateway.handlers import Desk
from services.gateway.ice import IceServers, ice_servers, link_headers
from services.gateway.problems import GatewayError, responses
from services.gateway.rtc import End, RtcDesk
from services.gateway.settings import Settings
from shared.contracts.commands import MAX_SIDE, StreamSpec
from shared.contracts.signalling import MAX_SDP_CHARS
from shared.contracts.sinks import WhepSink
from shared.contracts.sources import WhipSource
from shared.contracts.views import StreamView

SDP, FRAGMENT = "application/sdp", "application/trickle-ice-sdpfrag"
SESSION = Annotated[str, Path(pattern=r"^[A-Za-z0-9_-]{1,64}$", description="The session, from Location.")]
IfMatch = Annotated[str | None, Header(description="The ETag of the ICE session; * asks for an ICE restart.")]
Takeover = Annotated[bool, Query(description="Send whoever publishes now away.")]


class MediaTypeError(GatewayError):
    """The body is not of the type that the route takes."""

    status, title = 415, "Wrong media type"


class PreconditionError(GatewayError):
    """If-Match is needed."""

    status, title = 428, "If-Match needed"


def _body(kind: str) -> dict[str, Any]:
    return {"requestBody": {"required": True, "content": {kind: {"schema": {"type": "string"}}}}}


async def _text(request: Request, kind: str) -> str:
    """The body, of the type asked for. Raises MediaTypeError, InvalidError."""
    given = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if given != kind:
        raise MediaTypeError(f"send {kind}, not {given[:60] or 'nothing'}")
    try:
        text = (await request.body()).decode()
    except UnicodeDecodeError:
        raise InvalidError("the body is no UTF-8 text") from None
    if not text.strip() or len(text) > MAX_SDP_CHARS:
        raise InvalidError(f"the body has to have 1 to {MAX_SDP_CHARS} characters of SDP")
    return text


def router(desk: Desk, rtc: RtcDesk, settings: Settings, seen: Seen) -> APIRouter:
    """The routes, bound to a desk."""
    errors = responses(404, 406, 409, 412, 415, 428)
    api = APIRouter(prefix="/v1", tags=["webrtc"], responses=errors)
    found, changing = Depends(seen), Depends(seen.change)

    def links(caller: Caller, response: Response) -> None:
        for link in link_headers(ice_servers(settings, caller.name, time.time())):
            response.headers.append("Link", link)

    async def negotiate(request: Request, stream: str, end: End, caller: Caller, takeover: bool) -> Response:
        answer = await rtc.offer(stream, end, await _text(request, SDP), takeover=takeover)
        headers = {"Location": f"/v1/streams/{stream}/{end}/{answer.session}", "ETag": f'"{answer.etag}"'}
        response = Response(answer.sdp, 201, {**headers, "Accept-Patch": FRAGMENT}, SDP)
        links(caller, response)
        return response

    async def trickle(request: Request, stream: str, end: End, session: str, etag: str | None) -> Response:
        fragment = await _text(request, FRAGMENT)
        if etag is None:
            raise PreconditionError("send If-Match with the ETag of the session's answer")
        if etag.strip() == "*":
            raise InvalidError("ICE restarts are not supported: delete the session and offer again")
        await rtc.trickle(stream, end, session, fragment, etag.strip().removeprefix("W/").strip('"')[:64])
        return Response(status_code=204, headers={"ETag": etag.strip()})

    def hello(caller: Caller) -> Response:
        response = Response(status_code=204, headers={"Accept-Post": SDP, "Allow": "OPTIONS, POST"})
        links(caller, response)
        return response

    @api.get("/ice-servers", operation_id="iceServers")
    async def servers(caller: Who) -> IceServers:
        """STUN and TURN servers for a peer connection; credentials may be the caller's own and end after a while."""
        return IceServers(iceServers=ice_servers(settings, caller.name, time.time()))

    @api.post(
        "/streams/{stream}/whip", status_code=201, operation_id="whip", openapi_extra=_body(SDP), response_class=_Sdp
    )
    async def whip(
        stream: StreamId, request: Request, caller: Operator, takeover: Takeover = False, _: StreamView = changing
    ) -> Response:
        """Publish to a stream with a WHIP source: an offer (H.264 or VP8, Opus) in, the answer out.

        409 while somebody publishes already, unless ``takeover``.
        """
        return await negotiate(request, stream, "whip", caller, takeover)

    @api.options("/streams/{stream}/whip", status_code=204, operation_id="whipOptions")
    async def whip_options(caller: Operator, _: StreamView = changing) -> Response:
        """The ICE servers as Link headers, before the offer."""
        return hello(caller)

    @api.patch(
        "/streams/{stream}/whip/{session}", status_code=204, operation_id="whipTrickle", openapi_extra=_body(FRAGMENT)
    )
    async def whip_trickle(
        stream: StreamId, session: SESSION, request: Request, if_match: IfMatch = None, _: StreamView = changing
    ) -> Response:
        """Candidates as they are found. 412: they are for another ICE session; restarts (If-Match: *) get 422."""
        return await trickle(request, stream, "whip", session, if_match)

    @api.delete("/streams/{stream}/whip/{session}", status_code=200, operation_id="whipEnd", response_class=Response)
    async def whip_end(stream: StreamId, session: SESSION, _: StreamView = changing) -> Response:
        """Publish no more. The stream waits for the next publisher for its ``reconnect_s``."""
        await rtc.close(stream, "whip", session)
        return Response(status_code=200)

    @api.post(
        "/streams/{stream}/whep", status_code=201, operation_id="whep", openapi_extra=_body(SDP), response_class=_Sdp
    )
    async def whep(stream: StreamId, request: Request, caller: Who, _: StreamView = found) -> Response:
        """Watch a stream: an offer to receive (H.264, Opus) in, the answer out. One encode serves all viewers."""
        return await negotiate(request, stream, "whep", caller, False)

    @api.options("/streams/{stream}/whep", status_code=204, operation_id="whepOptions")
    async def whep_options(caller: Who, _: StreamView = found) -> Response:
        """The ICE servers as Link headers, before the offer."""
        return hello(caller)

    @api.patch(
        "/streams/{stream}/whep/{session}", status_code=204, operation_id="whepTrickle", openapi_extra=_body(FRAGMENT)
    )
    async def whep_trickle(
        stream: StreamId, session: SESSION, request: Request, if_match: IfMatch = None, _: StreamView = found
    ) -> Response:
        """Candidates as they are found."""
        return await trickle(request, stream, "whep", session, if_match)

    @api.delete("/streams/{stream}/whep/{session}", status_code=200, operation_id="whepEnd", response_class=Response)
    async def whep_end(stream: StreamId, session: SESSION, _: StreamView = found) -> Response:
        """Watch no more."""
        await rtc.close(stream, "whep", session)
        return Response(status_code=200)

    @api.post("/whip", status_code=201, operation_id="whipCreate", openapi_extra=_body(SDP), response_class=_Sdp)
    async def whip_create(
        request: Request,
        tenant: Tenant,
        caller: Operator,
        prompt: Annotated[str, Query(min_length=1, max_length=8000)],
        steps: Annotated[int, Query(ge=1, le=4)] = 1,
        fps: Annotated[float | None, Query(gt=0, le=240)] = None,
        width: Annotated[int | None, Query(ge=16, le=MAX_SIDE)] = None,
        height: Annotated[int | None, Query(ge=16, le=MAX_SIDE)] = None,
        reconnect_s: Annotated[float, Query(ge=0, le=3600)] = 15.0,
    ) -> Response:
        """Start a stream and publish to it in one go, for encoders that know one URL. It ends ``reconnect_s`` after them."""
        await _text(request, SDP)
        stream = new_stream_id()
        spec = StreamSpec(
            source=WhipSource(reconnect_s=reconnect_s),
            sinks=(WhepSink(),),
            prompt=prompt,
            steps=steps,
            fps=fps,
            width=width,
            height=height,
            tenant=tenant,
        )
        async with desk.beginning(stream, spec):
            return await negotiate(request, stream, "whip", caller, False)

    return api


class _Sdp(Response):
    """For the OpenAPI."""

    media_type = SDP
