"""Picks and opens the source a spec asks for."""

from __future__ import annotations

from services.ingest.heard import Heard
from services.ingest.links import Links
from services.ingest.settings import Settings
from services.ingest.sources.clock import ClockSource
from services.ingest.sources.file import FileSource
from services.ingest.sources.listening import DeviceSource, RtmpListenSource, check_device
from services.ingest.sources.looped import LoopedSource
from services.ingest.sources.pattern import PatternSource
from services.ingest.sources.port import Source, SourceError
from services.ingest.sources.pushed import PushedSource
from services.ingest.sources.url import UrlSource
from services.ingest.sources.whip import WhipSource
from shared.contracts import commands, sources
from shared.contracts.commands import StreamSpec
from shared.media.errors import MediaError
from shared.media.paths import inside
from shared.rtc.inbox import Inbox

LIVE_ONLY = (sources.WhipSource, sources.PushSource, sources.DeviceSource, sources.RtmpListenSource)
DEVICE_BACK_S = 60.0


def open_source(
    spec: StreamSpec,
    width: int,
    height: int,
    settings: Settings,
    inbox: Inbox,
    links: Links,
    heard: Heard,
) -> Source:
    """Open what ``spec.source`` names, fitted to ``width`` × ``height``. Blocks; raises SourceError with one line.

    ``inbox`` is filled by the publisher of a WHIP source; ``links`` is what a source that may break tells and asks,
    ``heard`` has what is pushed.
    """
    source = spec.source
    if isinstance(source, commands.PatternSource):
        return PatternSource(width, height, source.frames, spec.fps, source.look)
    if isinstance(source, commands.NoSource):
        return ClockSource(source.frames, spec.fps)
    if spec.mode is not commands.Mode.LIVE and isinstance(source, LIVE_ONLY):
        raise SourceError(f"a source of kind {source.kind} is live: start the stream with mode live")
    if isinstance(source, sources.WhipSource):
        return WhipSource(inbox, width, height, spec.fit, spec.fps, spec.audio)
    if isinstance(source, sources.PushSource):
        return PushedSource(width, height, spec.fit, spec.fps, source.idle_s, links, heard)
    if isinstance(source, sources.UrlSource):
        return UrlSource(source.url, source.reconnect_s, width, height, spec.fit, spec.fps, spec.audio, links)
    if isinstance(source, sources.RtmpListenSource):
        host, ports, back_s = settings.rtmp_host, settings.rtmp_range, source.reconnect_s
        return RtmpListenSource(host, ports, source.key, back_s, width, height, spec.fit, spec.fps, spec.audio, links)
    if isinstance(source, sources.DeviceSource):
        url = check_device(source.device, settings.device_patterns)
        return DeviceSource(url, DEVICE_BACK_S, width, height, spec.fit, spec.fps, False, links)
    try:
        path = inside(source.path, settings.roots, verb="read")
    except MediaError as error:
        raise SourceError(str(error)) from None

    def open_file() -> FileSource:
        return FileSource(path, width, height, spec.fit, spec.fps, spec.audio)

    return LoopedSource(open_file) if source.loop else open_file()
