"""Recordings in progress and how they become the final file.

While it runs a recording is a fragmented MP4 beside its destination (``clip.mp4`` → ``clip.part.mp4``), playable even
after ``kill -9``. At the end, or by whoever cleans up after a crash, it is copied without re-encoding into an MP4 with
its index in front, which appears under the final name at once or not at all.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import av.error

from shared.media.errors import MediaError, one_line
from shared.media.probe import picture_stream


def part_path(final: str | Path) -> Path:
    """Where the recording of ``final`` is written while it runs."""
    final = Path(final)
    return final.with_name(f"{final.stem}.part{final.suffix or '.mp4'}")


def set_aside(part: Path) -> Path | None:
    """Keep a recording that a dead process left, as an earlier piece of the same one. None when there is nothing."""
    if not part.exists():
        return None
    if part.stat().st_size == 0:
        part.unlink()
        return None
    number = len(earlier_pieces(part))
    piece = part.with_name(f"{part.stem}-{number}{part.suffix}")
    os.replace(part, piece)
    return piece


def earlier_pieces(part: Path) -> list[Path]:
    """Pieces set aside before ``part``, oldest first."""
    pieces: list[Path] = []
    while (piece := part.with_name(f"{part.stem}-{len(pieces)}{part.suffix}")).exists():
        pieces.append(piece)
    return pieces


def keep_foreign(part: Path) -> list[Path]:
    """Give files under a recording's names that nobody vouches for (its own and its pieces') new names; those names.

    They may be what is left of a run that was killed, or somebody's own. Only an empty one is removed.
    """
    kept: list[Path] = []
    for piece in [*earlier_pieces(part), part]:
        if not os.path.lexists(piece):
            continue
        if not piece.is_symlink() and piece.is_file() and piece.stat().st_size == 0:
            piece.unlink()
            continue
        number = 0
        while os.path.lexists(name := part.with_name(f"{part.stem}.kept-{number}{part.suffix}")):
            number += 1
        os.rename(piece, name)
        kept.append(name)
    return kept


def discard(part: Path) -> None:
    """Remove a recording and its earlier pieces."""
    for piece in [*earlier_pieces(part), part]:
        piece.unlink(missing_ok=True)


def finalise_part(part: str | Path, final: str | Path) -> int:
    """Make ``final`` of a recording: stream copy, index in front, atomic; then the recording is removed.

    A recording that was cut off is kept up to its last whole packet. Returns the number of pictures. Raises MediaError,
    leaving the recording, when there is nothing to save or the destination cannot be written.
    """
    part, final = Path(part), Path(final)
    pieces = [piece for piece in [*earlier_pieces(part), part] if piece.exists()]
    scratch = final.with_name(f".{final.name}.{os.getpid()}.tmp")
    try:
        pictures = _copy(pieces, scratch)
        if not pictures:
            raise MediaError(f"{part}: holds no picture; nothing to save")
        os.replace(scratch, final)
    except (OSError, av.error.FFmpegError) as error:
        raise MediaError(
            f"{final}: cannot be written ({one_line(error)}); free space or choose another folder"
        ) from None
    finally:
        scratch.unlink(missing_ok=True)
    discard(part)
    return pictures


def _copy(pieces: list[Path], scratch: Path) -> int:
    pictures = 0
    last_dts: dict[str, int] = {}
    ends: dict[str, Fraction] = {}  # of each track, in seconds
    with contextlib.ExitStack() as stack:
        output: Any = None
        tracks: dict[str, Any] = {}
        for piece in pieces:
            source = _open(piece)
            if source is None:
                continue
            stack.enter_context(source)
            if output is None:
                output = stack.enter_context(
                    av.open(str(scratch), mode="w", format="mp4", options={"movflags": "+faststart"})
                )
                for stream in _tracks(source):
                    tracks[stream.type] = output.add_stream_from_template(stream)
            # A piece that begins at 0 again, as a sink's that was added while the stream ran, goes on where the last one
            # stopped. In any other timestamps go on by themselves; what would repeat a time is left out.
            end, shift = max(ends.values(), default=Fraction(0)), None
            for packet in _packets(source):
                kind = packet.stream.type
                if kind not in tracks:
                    continue
                if shift is None:
                    shift = end if packet.dts * packet.time_base < end / 2 else Fraction(0)
                later = round(shift / packet.time_base)
                packet.dts, packet.pts = packet.dts + later, packet.pts + later
                if packet.dts <= last_dts.get(kind, packet.dts - 1):
                    continue
                last_dts[kind] = packet.dts
                ends[kind] = (packet.dts + (packet.duration or 0)) * packet.time_base
                pictures += kind == "video"
                packet.stream = tracks[kind]
                output.mux(packet)
    return pictures


def _open(piece: Path) -> Any | None:
    try:
        container = av.open(str(piece), mode="r", format="mp4")
    except (av.error.FFmpegError, OSError):
        return None
    if picture_stream(container) is None:
        container.close()
        return None
    return container


def _tracks(source: Any) -> list[Any]:
    return [stream for stream in source.streams if stream.type in ("video", "audio")]


def _packets(source: Any) -> Iterator[Any]:
    """Whole packets up to the end, or up to where the file was cut."""
    try:
        for packet in source.demux(*_tracks(source)):
            if packet.dts is not None and packet.pts is not None and packet.size:
                yield packet
    except av.error.FFmpegError:
        return
