"""One client of the public demo's protocol: its frames become a stream's source, its settings the stream's.

The protocol: the server asks ``send_frame``; the client answers ``next_frame``, then its settings as JSON, then a JPEG. The
server says ``wait``, and asks again. Decisions only; the socket is in ``api/compat.py``.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from shared.contracts.commands import MAX_PROMPT_CHARS, StreamPatch, StreamSpec
from shared.contracts.sinks import NullSink
from shared.contracts.sources import MAX_PUSHED_BYTES, PushSource

FPS = 16.0
FRAME_S = 1.0 / FPS  # the demo takes no more
IDLE_S = 60.0
DEFAULT_PROMPT = "neon lights, glowing lines"
JPEG_BEGIN = b"\xff\xd8\xff"


class Awaited(StrEnum):
    """What the client is to send next."""

    STATUS = "status"
    SETTINGS = "settings"
    FRAME = "frame"


class Params(BaseModel):
    """The demo's settings of which we know what they mean; others are ignored. Its width and height are its own affair."""

    model_config = ConfigDict(extra="ignore")

    prompt: str = Field(default=DEFAULT_PROMPT, max_length=MAX_PROMPT_CHARS)
    restart: bool = False


class ProtocolError(ValueError):
    """The client does not keep to the protocol; the message is what it is told."""


def stream_of(user: uuid.UUID) -> str:
    """The stream of a client."""
    return f"demo-{user.hex}"


def spec_of(params: Params, model: str, tenant: str) -> StreamSpec:
    """The stream that a client's first settings begin."""
    return StreamSpec(
        source=PushSource(idle_s=IDLE_S),
        sinks=(NullSink(),),
        prompt=params.prompt.strip() or DEFAULT_PROMPT,
        model=model,
        fps=FPS,
        tenant=tenant,
        audio=False,
    )


@dataclass(slots=True)
class Turn:
    """What the server does after a message: says these, begins or changes the stream, passes a frame on."""

    say: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    begin: Params | None = None
    patch: StreamPatch | None = None
    frame: bytes | None = None
    ask_again: bool = False


@dataclass(slots=True)
class Talk:
    """One client's side of the protocol."""

    awaited: Awaited = Awaited.STATUS
    prompt: str | None = None  # the stream's; None: it has not begun

    @staticmethod
    def hello() -> list[dict[str, Any]]:
        """What a new client is told."""
        return [{"status": "connected", "message": "Connected"}, {"status": "wait"}, {"status": "send_frame"}]

    def on_json(self, message: Any) -> Turn:
        """A text message. Raises ProtocolError."""
        if not isinstance(message, dict):
            raise ProtocolError("a message is a JSON object")
        if self.awaited is Awaited.SETTINGS:
            return self._settings(message)
        match message.get("status"):
            case "next_frame":
                self.awaited = Awaited.SETTINGS
                return Turn()
            case "pause" | "stop":
                return Turn(patch=StreamPatch(paused=True) if self.prompt is not None else None)
            case "resume":
                patch = StreamPatch(paused=False) if self.prompt is not None else None
                return Turn(patch=patch, ask_again=True)
            case "no_frame":
                return Turn(ask_again=True)
            case "upload_done":
                return Turn(say=[{"status": "upload_done_ack"}])
            case _:
                return Turn()  # the demo ignores what it does not know

    def on_bytes(self, data: bytes) -> Turn:
        """A binary message. Raises ProtocolError."""
        if self.awaited is not Awaited.FRAME:
            raise ProtocolError('a frame comes after {"status": "next_frame"} and the settings')
        self.awaited = Awaited.STATUS
        if not data:
            return Turn(ask_again=True)
        if not data.startswith(JPEG_BEGIN) or len(data) > MAX_PUSHED_BYTES:
            raise ProtocolError(f"a frame is a JPEG of at most {MAX_PUSHED_BYTES} bytes")
        return Turn(say=[{"status": "wait"}], frame=data, ask_again=True)

    def _settings(self, message: dict[str, Any]) -> Turn:
        params = Params.model_validate(message)
        self.awaited = Awaited.FRAME
        wanted = params.prompt.strip() or DEFAULT_PROMPT
        if self.prompt is None:
            self.prompt = wanted
            return Turn(begin=params)
        changed = wanted if wanted != self.prompt else None
        self.prompt = wanted
        if changed is None and not params.restart:
            return Turn()
        return Turn(patch=StreamPatch(prompt=changed, reset=params.restart))


def settings_page(model: str, max_users: int) -> dict[str, Any]:
    """What ``/api/settings`` tells: which fields a client may show."""
    info = {"name": f"Rheocast ({model})", "input_mode": "image"}
    return {
        "info": {
            "title": "Info",
            "type": "object",
            "properties": {name: {"default": value, "title": name, "type": "string"} for name, value in info.items()},
        },
        "input_params": {
            "title": "InputParams",
            "type": "object",
            "properties": {
                "prompt": {
                    "default": DEFAULT_PROMPT,
                    "title": "Prompt",
                    "type": "string",
                    "field": "textarea",
                    "id": "prompt",
                },
                "restart": {"default": False, "title": "Restart", "type": "boolean", "id": "restart"},
            },
        },
        "max_queue_size": max_users,
        "page_content": "",
    }
