"""Egress' settings. The only reader of its environment."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from shared.config import ServiceSettings
from shared.media.paths import parse_roots
from shared.rtc.places import RtcSettings


class Settings(RtcSettings, ServiceSettings):
    """``file_roots``: folders in which files may be recorded, joined by ":"; none: no file sink.

    ``loss_timeout_s`` (lossless): how long a gap may stay open once a newer chunk has come. ``stall_s`` (lossless): how
    long nothing may come after the source has ended. ``lost_after_s`` (live): how long after its deadline a chunk is
    waited for. ``reorder_ms`` (live): how long a newer chunk waits for one it has overtaken. ``sink_frames`` bounds the
    frames that wait for a sink. ``whep_viewers`` bounds the viewers of one stream by WebRTC. ``h264_encoder`` is for live
    sinks: an encoder of FFmpeg's, or "auto" for the hardware's where it really works. Pushes go to no private network, unless
    ``allow_private``; ``allowed_hosts`` (names, addresses, CIDR networks, by commas) are fine always.
    """

    file_roots: str = ""
    max_streams: int = Field(default=64, ge=1)
    loss_timeout_s: float = Field(default=10.0, gt=0)
    stall_s: float = Field(default=60.0, gt=0)
    lost_after_s: float = Field(default=2.0, gt=0)
    reorder_ms: float = Field(default=100.0, ge=0)
    sink_frames: int = Field(default=32, ge=5, le=1024)
    repeat_s: float = Field(default=1.0, gt=0)
    h264_encoder: str = Field(default="libx264", pattern=r"^(auto|[a-z0-9_]{3,32})$")
    allow_private: bool = False
    allowed_hosts: str = ""
    audio_grace_s: float = Field(default=2.0, ge=0)
    whep_viewers: int = Field(default=100, ge=1)

    @property
    def roots(self) -> tuple[Path, ...]:
        """``file_roots`` as resolved folders."""
        return parse_roots(self.file_roots)
