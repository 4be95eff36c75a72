"""The gateway's side of WebRTC's signalling: SDP and candidates to the service that has the stream, its answers as errors."""

from __future__ import annotations

from typing import Literal

from services.gateway.errors import BusyError, ConflictError, InvalidError, NoAnswerError, UnknownPartError
from services.gateway.problems import GatewayError
from shared.bus.port import Bus, BusError, NoResponderError
from shared.contracts import subjects
from shared.contracts.signalling import RtcAnswer, RtcCandidate, RtcClose, RtcOffer, RtcRefusal

ANSWER_S = 10.0
End = Literal["whip", "whep", "peer"]
WHAT: dict[End, str] = {"whip": "no WHIP source", "whep": "no viewers' end", "peer": "no client of both ways"}


class CodecError(GatewayError):
    """No codec in common."""

    status, title = 406, "No codec in common"


class StaleError(GatewayError):
    """The fragment is for another ICE session."""

    status, title = 412, "Other ICE session"


_ERRORS: dict[RtcRefusal, type[GatewayError]] = {
    RtcRefusal.CODEC: CodecError,
    RtcRefusal.BUSY: ConflictError,
    RtcRefusal.FULL: BusyError,
    RtcRefusal.STALE: StaleError,
    RtcRefusal.UNAVAILABLE: NoAnswerError,
}


class RtcDesk:
    """Requests on ``rheo.stream.<id>.whip``, ``.whep`` and ``.peer``."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus

    async def offer(self, stream: str, end: End, sdp: str, *, takeover: bool = False) -> RtcAnswer:
        """The answer to an offer. Raises GatewayErrors."""
        return await self._ask(stream, end, RtcOffer(stream=stream, sdp=sdp, takeover=takeover))

    async def trickle(self, stream: str, end: End, session: str, fragment: str, etag: str) -> None:
        """Candidates of a session's peer. Raises GatewayErrors."""
        await self._ask(stream, end, RtcCandidate(stream=stream, session=session, fragment=fragment, etag=etag))

    async def close(self, stream: str, end: End, session: str) -> None:
        """The peer leaves. Raises GatewayErrors."""
        await self._ask(stream, end, RtcClose(stream=stream, session=session))

    async def _ask(self, stream: str, end: End, message: RtcOffer | RtcCandidate | RtcClose) -> RtcAnswer:
        try:
            answer: RtcAnswer = await self._bus.request(subjects.stream(stream, end), message, ANSWER_S)
        except NoResponderError:
            raise ConflictError(
                f"stream {stream} has {WHAT[end]} that is open: it was started otherwise, or has ended"
            ) from None
        except BusError as error:
            raise NoAnswerError(
                f"the stream's {'ingest' if end == 'whip' else 'egress'} did not answer: {error}"
            ) from None
        if answer.unknown:
            raise UnknownPartError(answer.error or "there is no such session")
        if answer.error is not None:
            raise _ERRORS.get(answer.refusal, InvalidError)(answer.error)
        return answer
