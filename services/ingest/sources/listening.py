"""RTMP that is pushed to us, and cameras at this machine: opened otherwise than an address, read alike."""

from __future__ import annotations

import logging
import secrets
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import av
import av.error

from services.ingest.links import Links
from services.ingest.sources.port import Picture, Sound, SourceError
from services.ingest.sources.rtmp import APP, Publisher
from services.ingest.sources.url import UrlSource
from services.ingest.sources.url_opening import OPEN_S, PROBE, SILENT_S
from shared.contracts.commands import Fit
from shared.contracts.events import EventKind
from shared.media.errors import MediaError, one_line
from shared.media.rtmp.messages import RtmpError

log = logging.getLogger(__name__)

LISTEN_S, LOOK_S = 2.0, 0.25  # so long it is listened at a time, and so often looked whether anybody wants it


class RtmpListenSource(UrlSource):
    """Waits for a publisher as long as the stream lives; one who breaks off may come back within ``reconnect_s``.

    Its port is its own until it is closed, whoever comes and goes.
    """

    def __init__(
        self,
        host: str,
        ports: tuple[int, int],
        key: str,
        reconnect_s: float,
        width: int,
        height: int,
        fit: Fit,
        fps: float | None,
        with_audio: bool,
        links: Links,
    ) -> None:
        self._key = key or secrets.token_urlsafe(12)
        self._listener = listen(host, ports)
        self._publisher: Publisher | None = None
        url = f"rtmp://{host}:{self._listener.getsockname()[1]}/{APP}/{self._key}"
        try:
            super().__init__(url, reconnect_s, width, height, fit, fps, with_audio, links)
        except BaseException:
            self._listener.close()
            raise

    def _start(self) -> None:
        """Nobody is there yet."""

    def _connect(self) -> Any:
        publisher = self._publisher = Publisher(self._accept(), self._key, SILENT_S, lambda: self._links.stopped)
        options = {**PROBE, "fflags": "nobuffer"}
        publisher.patience.until = time.monotonic() + OPEN_S
        container = av.open(publisher, format="flv", options=options, timeout=(OPEN_S, SILENT_S))
        publisher.patience.until = None
        return container

    def _accept(self) -> socket.socket:
        """The next one who comes. Raises OSError when nobody does for a while."""
        until = time.monotonic() + LISTEN_S
        while not self._links.stopped and time.monotonic() < until:
            with suppress(TimeoutError):
                return self._listener.accept()[0]
        raise OSError("nobody pushes")

    def close(self) -> None:
        """Hang up, and let others have the port."""
        super().close()
        self._listener.close()

    def _hang_up(self) -> None:
        super()._hang_up()
        if self._publisher is not None:
            self._publisher.close()
            self._publisher = None

    def read(self) -> Iterator[Picture | Sound]:
        self._links.tell(EventKind.LISTENING, self._url)
        while not self._links.stopped:
            try:
                self._open(first=True)
            except (MediaError, av.error.FFmpegError, OSError) as error:
                if isinstance(error, RtmpError):
                    log.info("port %d: %s", self._listener.getsockname()[1], one_line(error))
                self._hang_up()
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


def listen(host: str, ports: tuple[int, int]) -> socket.socket:
    """Listens at a free port of those that are for pushes. Raises SourceError when all are taken."""
    for port in range(ports[0], ports[1] + 1):
        listener = socket.socket()
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((host, port))
            listener.listen(1)
        except OSError:
            listener.close()
            continue
        listener.settimeout(LOOK_S)
        return listener
    raise SourceError(
        f"all ports for pushes ({ports[0]}-{ports[1]}) are taken: stop a stream, or widen RHEOCAST_RTMP_PORTS"
    )
