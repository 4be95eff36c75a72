"""Ingest's settings. The only reader of its environment."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from shared.config import ServiceSettings
from shared.media.addresses import AddressRules
from shared.media.paths import parse_roots
from shared.rtc.places import RtcSettings


class Settings(RtcSettings, ServiceSettings):
    """``file_roots``: folders whose files may be streamed, joined by ":"; none: no file source.

    ``max_streams`` bounds the open sources. ``read_ahead`` is the number of decoded frames that may wait for a chunk.
    ``stall_s``: a stream fails when chunks are under way and no verdict has come for so long. ``repeat_s`` is how
    often the end of a source is told until everything is closed. ``skip_longest_s``: a picture in which nothing moves is
    made anew at least so often. Addresses are pulled from no private network, unless ``allow_private``; ``allowed_hosts``
    (names, addresses, CIDR networks, by commas) are fine always. ``devices``: cameras that may be opened, as patterns, by
    commas. RTMP pushes are awaited at ``rtmp_host``, each on a port of ``rtmp_ports``. ``trace_ratio``: the share of chunks
    whose spans are exported (where they are at all); late, dropped and failed ones are, whatever it is.
    """

    file_roots: str = ""
    allow_private: bool = False
    allowed_hosts: str = ""
    devices: str = "/dev/video*"
    rtmp_host: str = "127.0.0.1"
    rtmp_ports: str = Field(default="19350-19399", pattern=r"^\d{1,5}-\d{1,5}$")
    max_streams: int = Field(default=64, ge=1)
    read_ahead: int = Field(default=8, ge=5, le=256)
    stall_s: float = Field(default=60.0, gt=0)
    open_timeout_s: float = Field(default=8.0, gt=0)
    repeat_s: float = Field(default=0.5, gt=0)
    skip_longest_s: float = Field(default=5.0, gt=0)
    trace_ratio: float = Field(default=1.0, ge=0.0, le=1.0)

    @property
    def rules(self) -> AddressRules:
        """Which addresses may be opened."""
        return AddressRules.of(self.allow_private, self.allowed_hosts)

    @property
    def device_patterns(self) -> tuple[str, ...]:
        """``devices``, one by one."""
        return tuple(each.strip() for each in self.devices.split(",") if each.strip())

    @property
    def rtmp_range(self) -> tuple[int, int]:
        """The first and the last port for pushes."""
        first, last = self.rtmp_ports.split("-")
        return int(first), int(last)

    @property
    def roots(self) -> tuple[Path, ...]:
        """``file_roots`` as resolved folders."""
        return parse_roots(self.file_roots)
