"""Picks and opens the source a spec asks for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from services.ingest.links import Links
from services.ingest.rtc.inbox import Inbox
from services.ingest.sources.clock import ClockSource
from services.ingest.sources.file import FileSource
from services.ingest.sources.looped import LoopedSource
from services.ingest.sources.pattern import PatternSource
from services.ingest.sources.port import Source, SourceError
from services.ingest.sources.url import UrlSource
from services.ingest.sources.whip import WhipSource
from shared.contracts import commands, sources
from shared.contracts.commands import StreamSpec
from shared.media.errors import MediaError
from shared.media.paths import inside


def open_source(
    spec: StreamSpec,
    width: int,
    height: int,
    roots: Sequence[Path],
    inbox: Inbox | None = None,
    links: Links | None = None,
) -> Source:
    """Open what ``spec.source`` names, fitted to ``width`` × ``height``. Blocks; raises SourceError with one line.

    ``inbox`` is filled by the publisher of a WHIP source; ``links`` is what a source that may break tells and asks.
    """
    source = spec.source
    if isinstance(source, commands.PatternSource):
        return PatternSource(width, height, source.frames, spec.fps, source.look)
    if isinstance(source, commands.NoSource):
        return ClockSource(source.frames, spec.fps)
    if isinstance(source, sources.WhipSource) and inbox is not None:
        if spec.mode is not commands.Mode.LIVE:
            raise SourceError("a WHIP source is live: start the stream with mode live")
        return WhipSource(inbox, width, height, spec.fit, spec.fps, spec.audio)
    if isinstance(source, sources.UrlSource) and links is not None:
        return UrlSource(source.url, source.reconnect_s, width, height, spec.fit, spec.fps, spec.audio, links)
    if not isinstance(source, commands.FileSource):
        raise SourceError(f"this ingest cannot open a source of kind {source.kind!r}")
    try:
        path = inside(source.path, roots, verb="read")
    except MediaError as error:
        raise SourceError(str(error)) from None

    def open_file() -> FileSource:
        return FileSource(path, width, height, spec.fit, spec.fps, spec.audio)

    return LoopedSource(open_file) if source.loop else open_file()
