"""WebRTC's signalling: the gateway carries SDP and candidates, the media begins and ends in ingest and egress.

Request/reply on ``rheo.stream.<id>.whip`` (the ingest that has the stream answers) and ``rheo.stream.<id>.whep`` (egress).
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from shared.contracts.refs import Wire

MAX_SDP_CHARS = 100_000


class RtcOffer(Wire):
    """gateway → ingest or egress: an SDP offer. Answered by RtcAnswer. ``ice_servers`` are those of the gateway's settings."""

    kind: Literal["rtc_offer"] = "rtc_offer"
    stream: str
    sdp: str = Field(max_length=MAX_SDP_CHARS)


class RtcCandidate(Wire):
    """gateway → ingest or egress: a trickled ``application/trickle-ice-sdpfrag``, for a session. Answered by RtcAnswer."""

    kind: Literal["rtc_candidate"] = "rtc_candidate"
    stream: str
    session: str = Field(max_length=64)
    fragment: str = Field(max_length=MAX_SDP_CHARS)


class RtcClose(Wire):
    """gateway → ingest or egress: the peer leaves. Answered by RtcAnswer."""

    kind: Literal["rtc_close"] = "rtc_close"
    stream: str
    session: str = Field(max_length=64)


class RtcAnswer(Wire):
    """Reply to the three above. ``error`` is one line; ``unknown``: there is no such session."""

    kind: Literal["rtc_answer"] = "rtc_answer"
    session: str = ""
    sdp: str = ""
    error: str | None = None
    unknown: bool = False
