"""A fast look at a media file: what it holds, or one line that says why it will not do."""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import av.error
from av.stream import Disposition

from shared.media.errors import MediaError, one_line
from shared.media.orientation import of_frame

__all__ = ["MediaError", "MediaInfo", "probe", "why_unreadable"]

_PROBE_PACKETS = 600


@dataclass(frozen=True, slots=True)
class MediaInfo:
    """What a file holds. ``width`` × ``height`` is the displayed size: rotation and pixel aspect applied.

    ``fps`` is the average rate, ``frames`` the container's count where it knows one, ``time_base`` the seconds per tick
    of the picture timestamps, ``rotation`` the clockwise turn in degrees, ``audio_codec`` FFmpeg's name or "".
    ``variable_rate`` is the container's word; only reading the whole file can tell for certain.
    """

    width: int
    height: int
    fps: float
    frames: int | None
    duration_s: float
    time_base: Fraction
    has_audio: bool
    audio_codec: str
    rotation: int
    variable_rate: bool


def probe(path: str | Path) -> MediaInfo:
    """Look at ``path``; reads its headers and decodes one frame. Raises MediaError with one line that names the fix."""
    file = Path(path)
    _check_file(file)
    try:
        with av.open(str(file), mode="r") as container:
            return _look(file, container)
    except av.error.FFmpegError as error:
        raise MediaError(why_unreadable(file, error)) from None


def picture_stream(container: Any) -> Any | None:
    """The first moving-picture stream; cover pictures do not count. None when there is none."""
    for stream in container.streams.video:
        if not stream.disposition & Disposition.attached_pic:
            return stream
    return None


def display_size(width: int, height: int, sample_aspect: Fraction | None, transposed: bool) -> tuple[int, int]:
    """The size at which a stored picture is shown with square pixels, keeping its height."""
    if sample_aspect and sample_aspect > 0 and sample_aspect != 1:
        width = max(1, round(width * sample_aspect))
    return (height, width) if transposed else (width, height)


def _check_file(file: Path) -> None:
    try:
        if file.is_dir():  # on Python 3.11 it raises for a folder that may not be entered
            raise MediaError(f"{file}: is a folder; name a video file in it")
        size = file.stat().st_size
    except FileNotFoundError:
        raise MediaError(f"{file}: no such file; check the path") from None
    except OSError as error:
        raise MediaError(f"{file}: cannot be read ({error.strerror}); check its permissions") from None
    if not os.access(file, os.R_OK):
        raise MediaError(f"{file}: cannot be read (permission denied); check its permissions")
    if size == 0:
        raise MediaError(f"{file}: is empty; copy or record it again")


def why_unreadable(file: Path, error: BaseException) -> str:
    """One line for a file that FFmpeg does not open."""
    if _cut_before_index(file):
        return (
            f"{file}: an MP4 without its index: the recording or copy was cut short; copy it again, or repair it first"
        )
    if isinstance(error, av.error.InvalidDataError | av.error.EOFError):
        return f"{file}: is not a video file that FFmpeg can read; give an MP4, MOV, MKV, WebM or similar"
    return f"{file}: cannot be opened ({one_line(error)}); check the file"


def _cut_before_index(file: Path) -> bool:
    """Whether the file begins as an MP4 but has no index (``moov``) box."""
    try:
        with file.open("rb") as handle:
            end, position, boxes = file.stat().st_size, 0, set[bytes]()
            while position + 8 <= end and len(boxes) < 64:
                handle.seek(position)
                size, kind = struct.unpack(">I4s", handle.read(8))
                if size == 1:
                    size = struct.unpack(">Q", handle.read(8))[0]
                boxes.add(kind)
                if size < 8:
                    break
                position += size
    except (OSError, struct.error):
        return False
    return b"ftyp" in boxes and b"moov" not in boxes


def _look(file: Path, container: Any) -> MediaInfo:
    video = picture_stream(container)
    if video is None:
        what = "only sound" if container.streams.audio else "no pictures"
        raise MediaError(f"{file}: holds {what}; give a file with a video track")
    if video.codec_context is None:
        raise MediaError(f"{file}: its video codec is unknown to FFmpeg; convert it to H.264 first")
    video.thread_type = "NONE"
    frame = _first_frame(file, container, video)
    turned = of_frame(frame)
    aspect = video.sample_aspect_ratio or frame_aspect(video)
    width, height = display_size(frame.width, frame.height, aspect, turned.transpose)
    average = video.average_rate or video.guessed_rate or video.base_rate or Fraction(25)
    duration = float(video.duration * video.time_base) if video.duration else 0.0
    if not duration and container.duration:
        duration = container.duration / av.time_base
    audio = container.streams.audio[0] if container.streams.audio else None
    base = video.base_rate
    return MediaInfo(
        width=width,
        height=height,
        fps=float(average),
        frames=video.frames or None,
        duration_s=duration,
        time_base=Fraction(video.time_base),
        has_audio=audio is not None,
        audio_codec=_codec_name(audio),
        rotation=turned.degrees,
        variable_rate=bool(base and abs(float(base) / float(average) - 1.0) > 0.01),
    )


def frame_aspect(video: Any) -> Fraction | None:
    """The pixel aspect that only the codec knows."""
    return video.codec_context.sample_aspect_ratio if video.codec_context is not None else None


def _codec_name(audio: Any) -> str:
    return audio.codec_context.name if audio is not None and audio.codec_context is not None else ""


def _first_frame(file: Path, container: Any, video: Any) -> Any:
    broken: BaseException | None = None
    for number, packet in enumerate(container.demux(video)):
        try:
            for frame in packet.decode():
                return frame
        except av.error.FFmpegError as error:
            broken = error
        if number >= _PROBE_PACKETS:
            break
    if broken is not None:
        raise MediaError(f"{file}: no picture of it can be decoded ({one_line(broken)}); convert or copy it again")
    raise MediaError(f"{file}: has a video track without any picture; record it again")
