"""Picks and opens the sinks a spec asks for."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import suppress
from fractions import Fraction
from pathlib import Path

from services.egress.sinks.mp4 import Mp4Sink
from services.egress.sinks.null import NullSink
from services.egress.sinks.port import Sink, SinkError
from shared.contracts import commands
from shared.contracts.commands import StreamSpec
from shared.contracts.sinks import named
from shared.media.errors import MediaError
from shared.media.paths import inside
from shared.media.salvage import earlier_pieces, part_path

DEFAULT_RATE = Fraction(30)


def destinations(spec: StreamSpec, roots: Sequence[Path]) -> list[Path]:
    """The files that the spec's sinks write. Raises SinkError for one outside the allowed folders."""
    try:
        return [inside(sink.path, roots, verb="write") for sink in spec.sinks if isinstance(sink, commands.Mp4Sink)]
    except MediaError as error:
        raise SinkError(str(error)) from None


def open_sinks(
    spec: StreamSpec, width: int, height: int, roots: Sequence[Path], taken: Collection[Path], *, resume: bool
) -> dict[str, Sink]:
    """Open the files that ``spec.sinks`` names, and what discards frames; all else is live (services/egress/live).

    ``taken`` are files that other streams write. Raises SinkError with one line.
    """
    ids = [sink.id for sink in named(spec.sinks)]
    if twice := [name for name in ids if ids.count(name) > 1]:
        raise SinkError(f"two sinks have the id {twice[0]}: give each an id of its own")
    files = destinations(spec, roots)
    for file in files:
        if file in taken or files.count(file) > 1:
            raise SinkError(f"{file}: another stream is writing it; choose another name")
    if isinstance(spec.source, commands.FileSource):
        for file in files:
            _refuse_input(file, roots[0] / Path(spec.source.path).expanduser())
    rate = rate_of(spec)
    opened: dict[str, Sink] = {}
    recordings = iter(files)
    for sink in named(spec.sinks):
        if isinstance(sink, commands.Mp4Sink):
            opened[sink.id] = Mp4Sink(next(recordings), width, height, rate, resume=resume)
        elif isinstance(sink, commands.NullSink):
            opened[sink.id] = NullSink()
    return opened


def rate_of(spec: StreamSpec) -> Fraction:
    """A hint for encoders."""
    return Fraction(spec.fps).limit_denominator(1001) if spec.fps else DEFAULT_RATE


def _refuse_input(file: Path, source: Path) -> None:
    """Raises SinkError when recording ``file`` would touch the stream's own source, under whatever name."""
    part = part_path(file)
    for written in (file, part, *earlier_pieces(part)):
        with suppress(OSError):
            if written.samefile(source):
                raise SinkError(f"{file}: recording it would overwrite its own source {written}; choose another name")
