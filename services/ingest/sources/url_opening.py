"""Opens a container at an address that came over the wire: checked, pinned where FFmpeg allows it, never for ever."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import av

from services.ingest.sources.fetch import Patience, opener
from shared.media.addresses import AddressRules, Target, check_url, resolve
from shared.media.rtmp.application import tc_url

SCHEMES = ("rtmp", "rtmps", "rtsp", "rtsps", "http", "https")
OPEN_S = 6.0
SILENT_S = 2.0  # a live peer that sends nothing for so long is lost
HTTP_S = 10.0  # a playlist's next segment may take its time
# Formats that HTTP may bring: none that names files, devices or other protocols, but HLS, whose addresses are checked here.
WEB_FORMATS = "hls,mov,matroska,mpegts,flv,mp3,ogg,avi,mpjpeg,mjpeg,aac"
PROBE = {"probesize": "1000000", "analyzeduration": "1000000"}


def is_live(url: str) -> bool:
    """Whether frames come as they are captured. HTTP's come in files and segments."""
    return urlsplit(url).scheme.lower().startswith(("rt", "device"))


def open_url(url: str, rules: AddressRules, stopped: Callable[[], bool] = lambda: False) -> Any:
    """A PyAV container. Blocks at most some ten seconds. Raises MediaError, OSError or FFmpegError.

    By HTTP neither this nor reading it goes on for long once ``stopped``.
    """
    target = check_url(url, SCHEMES, rules)
    addresses = resolve(target, rules)
    if target.scheme in ("http", "https"):
        # FFmpeg's HLS would reuse its own connections: ours are not its.
        options = {**PROBE, "format_whitelist": WEB_FORMATS, "http_persistent": "0", "http_multiple": "0"}
        patience = Patience(HTTP_S, stopped)
        patience.until = time.monotonic() + OPEN_S + HTTP_S
        container = av.open(url, io_open=opener(rules, patience), options=options, timeout=(OPEN_S + HTTP_S, HTTP_S))
        patience.until = None
        return container
    options = {**PROBE, "analyzeduration": "500000", "fflags": "nobuffer"}
    if target.scheme.startswith("rtsp"):
        options |= {"rtsp_transport": "tcp", "protocol_whitelist": "rtsp,rtsps,rtp,tcp,tls"}
        options |= {"allowed_media_types": "video+audio"}
    else:
        options |= {"rtmp_live": "live", "rtmp_tcurl": tc_url(target), "protocol_whitelist": "rtmp,rtmps,tcp,tls"}
    return av.open(_pinned(target, addresses[0]), options=options, timeout=(OPEN_S, SILENT_S))


def _pinned(target: Target, address: str) -> str:
    """The same address with the host that was checked. With TLS the name stays: certificates are for names."""
    parts = urlsplit(target.url)
    host = target.host if target.scheme in ("rtmps", "rtsps") else address
    host = f"[{host}]" if ":" in host else host
    user = parts.netloc.rpartition("@")[0]
    netloc = f"{user}@{host}:{target.port}" if user else f"{host}:{target.port}"
    return urlunsplit((target.scheme, netloc, parts.path, parts.query, ""))
