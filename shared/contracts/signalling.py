"""WebRTC's signalling: the gateway carries SDP and candidates, the media begins and ends in ingest and egress.

Request/reply on ``rheo.stream.<id>.whip`` (the ingest that has the stream answers), ``rheo.stream.<id>.whep`` and, for a client
of both ways, ``rheo.stream.<id>.peer`` (egress).
"""

from __future__ import annotations

from enum import StrEnum
from typing import Literal

from pydantic import Field

from shared.contracts.refs import Wire

MAX_SDP_CHARS = 100_000


class RtcRefusal(StrEnum):
    """Why an offer or a fragment was refused."""

    NONE = "none"
    INVALID = "invalid"  # no SDP, or one that nothing can be made of
    CODEC = "codec"  # none that both sides know
    BUSY = "busy"  # somebody publishes already
    FULL = "full"  # as many viewers as this instance takes
    STALE = "stale"  # a fragment for another ICE session than the one that runs
    RESTART = "restart"  # ICE restarts are not supported: make a new session
    UNAVAILABLE = "unavailable"  # this instance has no WebRTC


class RtcOffer(Wire):
    """gateway → ingest or egress: an SDP offer. Answered by RtcAnswer.

    ``takeover`` (WHIP): whoever publishes now is sent away; otherwise a second publisher is refused while the first is there.
    """

    kind: Literal["rtc_offer"] = "rtc_offer"
    stream: str
    sdp: str = Field(max_length=MAX_SDP_CHARS)
    takeover: bool = False


class RtcCandidate(Wire):
    """gateway → ingest or egress: a trickled ``application/trickle-ice-sdpfrag``, for a session. Answered by RtcAnswer."""

    kind: Literal["rtc_candidate"] = "rtc_candidate"
    stream: str
    session: str = Field(max_length=64)
    fragment: str = Field(max_length=MAX_SDP_CHARS)
    etag: str = Field(default="", max_length=64)  # of the ICE session it is meant for; empty: whichever runs


class RtcClose(Wire):
    """gateway → ingest or egress: the peer leaves. Answered by RtcAnswer."""

    kind: Literal["rtc_close"] = "rtc_close"
    stream: str
    session: str = Field(max_length=64)


class RtcAnswer(Wire):
    """Reply to the three above. ``error`` is one line; ``unknown``: there is no such session. ``etag``: of the ICE session."""

    kind: Literal["rtc_answer"] = "rtc_answer"
    session: str = ""
    sdp: str = ""
    error: str | None = None
    unknown: bool = False
    etag: str = ""
    refusal: RtcRefusal = RtcRefusal.NONE
