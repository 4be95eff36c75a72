"""RTMP that is pushed to us, and cameras at this machine: opened otherwise than an address, read alike."""

from __future__ import annotations

import secrets
import socket
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import av
import av.error

from services.ingest.sources.port import Picture, Sound, SourceError
from services.ingest.sources.url import UrlSource
from services.ingest.sources.url_opening import PROBE, SILENT_S
from shared.contracts.events import EventKind

LISTEN_S = 2  # a wait for a publisher is looked at so often


class RtmpListenSource(UrlSource):
    """Waits for a publisher as long as the stream lives; one who breaks off may come back within ``reconnect_s``."""

    def _start(self) -> None:
        """Nobody is there yet."""

    def _connect(self) -> Any:
        # FFmpeg's server takes one publisher, and turns away another application or key by itself.
        options = {
            **PROBE,
            "listen": "1",
            "timeout": str(LISTEN_S),
            "protocol_whitelist": "rtmp,tcp",
            "fflags": "nobuffer",
        }
        return av.open(self._url, format="flv", options=options, timeout=(LISTEN_S + 4.0, SILENT_S))

    def read(self) -> Iterator[Picture | Sound]:
        self._links.tell(EventKind.LISTENING, self._url)
        while not self._links.stopped:
            try:
                self._open(first=True)
            except (av.error.FFmpegError, OSError):
                self.close()
                self._links.wait(0.05)
                continue
            self._links.tell(EventKind.SOURCE_BACK, "the picture comes")
            yield from super().read()
            return


class DeviceSource(UrlSource):
    """Frames as the camera gives them; unplugged and plugged in again it goes on."""

    def _connect(self) -> Any:
        return av.open(self._url.removeprefix("device:"), format="v4l2", timeout=(SILENT_S * 2, SILENT_S))


def check_device(device: str, allowed: Sequence[str]) -> str:
    """Its address for a DeviceSource. Raises SourceError for a device that the operator has not named, or is not there."""
    if ".." in device or not any(fnmatchcase(device, pattern) for pattern in allowed):
        known = ", ".join(allowed) or "none"
        raise SourceError(
            f"device {device!r} is not among those allowed ({known}): the operator names it in RHEOCAST_DEVICES"
        )
    if not Path(device).exists():
        raise SourceError(f"there is no device {device} at this machine: plug the camera in, or choose another one")
    return f"device:{device}"


def listening_url(host: str, ports: tuple[int, int], key: str) -> str:
    """A free port of those that are for pushes, and the key. Raises SourceError when all are taken."""
    for port in range(ports[0], ports[1] + 1):
        with socket.socket() as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                trial.bind((host, port))
            except OSError:
                continue
        return f"rtmp://{host}:{port}/live/{key or secrets.token_urlsafe(12)}"
    raise SourceError(
        f"all ports for pushes ({ports[0]}-{ports[1]}) are taken: stop a stream, or widen RHEOCAST_RTMP_PORTS"
    )
