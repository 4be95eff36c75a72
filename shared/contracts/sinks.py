"""Where a stream's result goes: sinks that egress opens, several at once, added and removed while it runs."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter, ValidationError

from shared.contracts.refs import Wire
from shared.contracts.sources import MAX_URL_CHARS

SINK_ID_PATTERN = r"^[A-Za-z0-9_-]{0,32}$"


class _Sink(Wire):
    """``id`` names the sink within its stream; empty: egress' order, e.g. ``mp4-1``."""

    id: str = Field(default="", pattern=SINK_ID_PATTERN)


class Mp4Sink(_Sink):
    """An H.264 MP4 file inside one of egress' allowed folders, with the source's audio. Fragmented while it is written."""

    kind: Literal["mp4"] = "mp4"
    path: str = Field(min_length=1, max_length=4096)


class NullSink(_Sink):
    """Frames are paced and counted, then discarded."""

    kind: Literal["null"] = "null"


class HlsSink(_Sink):
    """HLS in the folder ``hls/<stream>`` of egress' first root: fMP4 segments and ``index.m3u8``, a sliding window."""

    kind: Literal["hls"] = "hls"
    segment_s: float = Field(default=1.0, ge=0.2, le=10.0)
    window: int = Field(default=8, ge=3, le=100)  # segments in the playlist


class RtmpSink(_Sink):
    """H.264 in FLV pushed to an RTMP(S) server; opened again with back-off when it breaks."""

    kind: Literal["rtmp"] = "rtmp"
    url: str = Field(min_length=1, max_length=MAX_URL_CHARS)


class WhepSink(_Sink):
    """WebRTC viewers, negotiated by WHEP at ``/v1/streams/{id}/whep``: one encode, many viewers. Opened by the first viewer."""

    kind: Literal["whep"] = "whep"


class NatsSink(_Sink):
    """Restyled frames as FramePublished on ``rheo.stream.<id>.out``, for a platform that subscribes."""

    kind: Literal["nats"] = "nats"
    format: Literal["jpeg", "rgb24"] = "jpeg"
    quality: int = Field(default=85, ge=1, le=100)


Sink = Annotated[Mp4Sink | NullSink | HlsSink | RtmpSink | WhepSink | NatsSink, Field(discriminator="kind")]


def named(sinks: Sequence[Sink]) -> tuple[Sink, ...]:
    """Sinks with the ids by which everybody calls those that have none: their kind and their place."""
    return tuple(s if s.id else s.model_copy(update={"id": f"{s.kind}-{n}"}) for n, s in enumerate(sinks, 1))


_KEPT: TypeAdapter[tuple[Sink, ...]] = TypeAdapter(tuple[Sink, ...])


def kept_sinks(begun: Sequence[Sink], changed: object) -> tuple[Sink, ...]:
    """A stream's sinks now, named: ``changed`` is its session's "destinations", None when nothing was added or removed."""
    if not isinstance(changed, list):
        return named(begun)
    try:
        return _KEPT.validate_python(changed)
    except ValidationError:
        return named(begun)  # of another release


class SinkState(StrEnum):
    """A live sink's life."""

    WAITING = "waiting"  # for its first keyframe
    LIVE = "live"
    BROKEN = "broken"  # it is opened again later, if that may help
    CLOSED = "closed"


class SinkFigures(Wire):
    """How one sink fares. ``slow``: it does not keep up and loses pictures. ``error`` is what broke it last, "" if nothing did.

    ``frames`` and ``bytes`` were sent; ``dropped`` pictures were not, because it was slow or broken. Of ``whep`` the
    frames are those encoded, for all ``viewers`` at once. Bytes of a file written from the stream's start are not counted.
    """

    id: str
    sink_kind: str
    state: SinkState = SinkState.LIVE
    slow: bool = False
    frames: int = 0
    bytes: int = 0
    dropped: int = 0
    breaks: int = 0
    error: str = ""
    viewers: int = 0


class FramePublished(Wire):
    """egress → platform and gateway (``.out``, core NATS): one restyled frame, whole.

    ``data`` as ``format`` says: a JPEG file, or ``height`` × ``width`` × 3 bytes RGB.
    """

    kind: Literal["frame_published"] = "frame_published"
    stream: str
    chunk: int
    pts: int
    captured_ns: int
    shown_ns: int
    format: Literal["jpeg", "rgb24"] = "jpeg"
    width: int
    height: int
    data: bytes


class SourcePreviewed(Wire):
    """ingest → gateway (``.preview``, core NATS): a frame of the fitted source as JPEG, while somebody looks."""

    kind: Literal["source_previewed"] = "source_previewed"
    stream: str
    captured_ns: int
    width: int
    height: int
    data: bytes


class Looking(Wire):
    """gateway → egress, ingest (``.looking``, core NATS): somebody looks at ``what`` now. Repeated every 2 s while so.

    For 5 s after the last one egress publishes ``out`` (result) and ingest ``preview`` (source) as JPEG: once, for
    all viewers. Nobody looks: nothing is encoded.
    """

    kind: Literal["looking"] = "looking"
    stream: str
    what: Literal["result", "source"] = "result"
    max_fps: float = Field(default=30.0, gt=0, le=120)


class AddSink(Wire):
    """gateway or platform → scheduler (``.control``): one more sink. Answered by accepted or refused, then applied{chunk}."""

    kind: Literal["add_sink"] = "add_sink"
    command: str
    stream: str
    sink: Sink
    tenant: str = ""


class RemoveSink(Wire):
    """gateway or platform → scheduler (``.control``): finish and close one sink, by its id. Answered like AddSink."""

    kind: Literal["remove_sink"] = "remove_sink"
    command: str
    stream: str
    sink: str = Field(pattern=SINK_ID_PATTERN)
    tenant: str = ""


class ChangeSinks(Wire):
    """scheduler → egress (``rheo.egress.assign``): carry out one AddSink or RemoveSink. Answered by an applied event, or a
    warning with this command when it could not be opened. A repetition is answered again."""

    kind: Literal["change_sinks"] = "change_sinks"
    instance: str
    stream: str
    epoch: int
    command: str
    add: Sink | None = None
    remove: str = ""
