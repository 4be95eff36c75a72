"""Where a stream's pictures come from. Ingest opens all of them; the gateway resolves names and paths first."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from shared.contracts.refs import Wire

MAX_URL_CHARS = 2048
MAX_PUSHED_BYTES = 900_000  # one message of the broker's default limit, with room for the rest


class FileSource(Wire):
    """A file on a disk that ingest can read, inside one of its allowed folders. ``loop``: begun again at its end."""

    kind: Literal["file"] = "file"
    path: str = Field(min_length=1, max_length=4096)
    loop: bool = False


class PatternSource(Wire):
    """A moving picture of ``frames`` frames (0: endless) that ingest draws.

    ``look``: a test pattern whose frames can be told apart (``bits``), or a ``scene`` for a style to work on.
    """

    kind: Literal["pattern"] = "pattern"
    frames: int = Field(default=0, ge=0)
    look: Literal["bits", "scene"] = "bits"


class NoSource(Wire):
    """Text to video: no source at all, ``frames`` frames (0: endless) are made from pure noise and the prompt."""

    kind: Literal["none"] = "none"
    frames: int = Field(default=0, ge=0)


class UrlSource(Wire):
    """What ingest pulls: ``rtmp(s)``, ``rtsp(s)``, or ``http(s)`` (HLS, or a file), live or to its end.

    A source that breaks is opened again with back-off for ``reconnect_s`` (0: it ends), and the last picture held meanwhile.
    The address is checked against private networks before every opening and redirect.
    """

    kind: Literal["url"] = "url"
    url: str = Field(min_length=1, max_length=MAX_URL_CHARS)
    reconnect_s: float = Field(default=60.0, ge=0.0, le=3600.0)


class RtmpListenSource(Wire):
    """Ingest waits for an RTMP push to ``rtmp://host:port/live/<key>``; its event ``listening`` tells the address.

    ``key`` empty: ingest makes one that nobody has guessed.
    """

    kind: Literal["rtmp_listen"] = "rtmp_listen"
    key: str = Field(default="", pattern=r"^[A-Za-z0-9_-]{0,64}$")
    reconnect_s: float = Field(default=60.0, ge=0.0, le=3600.0)


class DeviceSource(Wire):
    """A camera at the machine that ingest runs on, one of those its settings allow, e.g. ``/dev/video0``."""

    kind: Literal["device"] = "device"
    device: str = Field(min_length=1, max_length=256)


class WhipSource(Wire):
    """A browser's or encoder's WebRTC, negotiated by WHIP at ``/v1/streams/{id}/whip``. It may come back after a cut."""

    kind: Literal["whip"] = "whip"
    reconnect_s: float = Field(default=60.0, ge=0.0, le=3600.0)


class PushSource(Wire):
    """Frames pushed as PushedFrame on ``rheo.stream.<id>.push``: by a platform, or by the gateway for a WebSocket.

    No frame for ``idle_s`` (0: never): the source has ended.
    """

    kind: Literal["push"] = "push"
    idle_s: float = Field(default=60.0, ge=0.0, le=3600.0)


Source = Annotated[
    FileSource | PatternSource | NoSource | UrlSource | RtmpListenSource | DeviceSource | WhipSource | PushSource,
    Field(discriminator="kind"),
]


class PushedFrame(Wire):
    """platform or gateway → ingest (``.push``, core NATS): one whole picture.

    ``format`` jpeg: ``data`` is a JPEG file; rgb24: ``height`` × ``width`` × 3 bytes. ``captured_ns`` 0: when it arrives.
    ``last``: the source ends after it (``data`` may be empty).
    """

    kind: Literal["pushed_frame"] = "pushed_frame"
    stream: str
    format: Literal["jpeg", "rgb24"] = "jpeg"
    width: int = Field(default=0, ge=0, le=8192)
    height: int = Field(default=0, ge=0, le=8192)
    captured_ns: int = 0
    data: bytes = Field(default=b"", max_length=MAX_PUSHED_BYTES)
    last: bool = False
