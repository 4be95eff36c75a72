"""Containers that take packets which are encoded already: HLS, RTMP, MP4."""

from __future__ import annotations

import logging
import os
import shutil
import time
from abc import ABC, abstractmethod
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol

import av
import av.error

from services.egress.live.h264 import EncodedFrame, SharedEncoder
from services.egress.live.rtmp_push import RtmpPush
from services.egress.sinks.mp4 import PART_OPTIONS
from services.egress.sinks.port import SinkError
from shared.contracts.events import AudioCaptured
from shared.contracts.sinks import HlsSink, Mp4Sink, RtmpSink
from shared.media.addresses import AddressError, AddressRules, check_url
from shared.media.audio_header import AudioTemplate
from shared.media.errors import MediaError, one_line
from shared.media.salvage import discard, finalise_part, keep_foreign, part_path, set_aside

log = logging.getLogger(__name__)

RTMP = ("rtmp", "rtmps")
PLAYABLE = {
    "hls": {"aac", "mp3", "opus", "ac3"},
    "flv": {"aac", "mp3"},
    "mp4": {"aac", "mp3", "opus", "ac3", "eac3", "alac", "flac"},
}


class Muxer(Protocol):
    """One output. ``open`` comes first, ``close`` always; any may raise SinkError."""

    again: bool  # whether it is worth opening again after it broke

    def open(self, encoder: SharedEncoder, header: bytes) -> None: ...

    def video(self, frame: EncodedFrame) -> None: ...

    def audio(self, part: AudioCaptured) -> None: ...

    def close(self) -> str: ...


class PacketMuxer(ABC):
    """What all three have in common. Timestamps begin at 0 with the first frame; sound before it is left out."""

    again = False
    format = ""

    def __init__(self) -> None:
        self._container: Any = None
        self._video: Any = None
        self._audio: Any = None
        self._template: AudioTemplate | None = None
        self._zero: Fraction | None = None  # seconds
        self._last_dts: dict[int, int] = {}

    @abstractmethod
    def place(self) -> tuple[Any, dict[str, str]]:
        """The file to write, by path or open, and the muxer's options. Raises SinkError, AddressError, OSError."""

    def open(self, encoder: SharedEncoder, header: bytes) -> None:
        """Open the container. ``header`` describes the sound, b"" for none. Raises SinkError."""
        try:
            where, options = self.place()
            self._container = av.open(where, "w", format=self.format, options=options)
            self._video = self._container.add_stream_from_template(encoder.stream)
            self._video.codec_context.extradata = encoder.extradata
            if header:
                self._add_sound(header)
        except AddressError as error:
            raise SinkError(str(error)) from None
        except (av.error.FFmpegError, OSError, ValueError) as error:
            raise SinkError(self.broken(error)) from None

    def video(self, frame: EncodedFrame) -> None:
        """One access unit; the first must be a keyframe. Raises SinkError."""
        if self._zero is None:
            self._zero = frame.pts * frame.time_base
        self._mux(self._video, frame.data, (frame.pts, frame.dts, frame.duration), frame.time_base, frame.key)

    def audio(self, part: AudioCaptured) -> None:
        """Packets of the sound. Raises SinkError."""
        if self._audio is not None and self._zero is not None:
            for pts, dts, duration, data in part.packets:
                self._mux(self._audio, data, (pts, dts, duration), Fraction(*part.time_base), True)

    def close(self) -> str:
        """Complete it; what was made, in words. Raises SinkError."""
        container, self._container = self._container, None
        try:
            if container is not None:
                container.close()
        except (av.error.FFmpegError, OSError) as error:
            raise SinkError(self.broken(error)) from None
        finally:
            if self._template is not None:
                self._template.close()
                self._template = None
        return ""

    def broken(self, error: BaseException) -> str:
        """One line."""
        return f"{self.format}: {one_line(error)}"

    def _add_sound(self, header: bytes) -> None:
        try:
            self._template = AudioTemplate(header)
            codec = (
                self._template.stream.codec_context.codec.canonical_name
            )  # a decoder's own name may be another: mp3float
            if codec not in PLAYABLE[self.format]:
                log.warning("%s goes without sound: it cannot hold %s", self.format, codec)
                return
            self._audio = self._container.add_stream_from_template(self._template.stream)
        except MediaError as error:
            log.warning("%s goes without sound: %s", self.format, error)

    def _mux(self, stream: Any, data: bytes, times: tuple[int, int, int], time_base: Fraction, key: bool) -> None:
        assert self._zero is not None
        zero = int(self._zero / time_base)
        pts, dts, duration = times[0] - zero, times[1] - zero, times[2]
        if dts < 0 or dts <= self._last_dts.get(stream.index, -1):
            return
        self._last_dts[stream.index] = dts
        packet: Any = av.Packet(data)
        packet.pts, packet.dts, packet.duration, packet.time_base = pts, dts, duration, time_base
        packet.is_keyframe, packet.stream = key, stream
        try:
            self._container.mux(packet)
        except (av.error.FFmpegError, OSError) as error:
            raise SinkError(self.broken(error)) from None


class HlsMuxer(PacketMuxer):
    """``hls/<stream>/index.m3u8`` and fMP4 segments; old ones are deleted. The folder stays until the next stream of the id."""

    format = "hls"

    def __init__(self, spec: HlsSink, folder: Path) -> None:
        super().__init__()
        self._spec, self._folder = spec, folder

    def place(self) -> tuple[str, dict[str, str]]:
        if self._folder.exists():
            shutil.rmtree(self._folder)
        self._folder.mkdir(parents=True)
        mark = f"{time.time_ns() // 1_000_000:x}"  # a player that knew the folder before must not mix the two
        return str(self._folder / "index.m3u8"), {
            "hls_time": f"{self._spec.segment_s:g}",
            "hls_list_size": str(self._spec.window),
            "hls_delete_threshold": "2",
            "hls_flags": "delete_segments+independent_segments+program_date_time+temp_file",
            "hls_segment_type": "fmp4",
            "hls_fmp4_init_filename": f"init-{mark}.mp4",
            "hls_segment_filename": str(self._folder / f"{mark}-%d.m4s"),
        }

    def close(self) -> str:
        super().close()
        return f"HLS in {self._folder}"


class RtmpMuxer(PacketMuxer):
    """FLV to an RTMP server (:class:`RtmpPush`); worth opening again when it breaks."""

    format = "flv"
    again = True

    def __init__(self, spec: RtmpSink, rules: AddressRules) -> None:
        super().__init__()
        self._url, self._rules = spec.url, rules
        self._push: RtmpPush | None = None

    def place(self) -> tuple[RtmpPush, dict[str, str]]:
        self._push = RtmpPush(check_url(self._url, RTMP, self._rules), self._rules)
        return self._push, {"flvflags": "no_duration_filesize", "flush_packets": "1"}

    def close(self) -> str:
        push, self._push = self._push, None
        try:
            super().close()
            if push is not None:
                push.end()
        except OSError as error:
            raise SinkError(self.broken(error)) from None
        finally:
            if push is not None:
                push.close()
        return ""

    def broken(self, error: BaseException) -> str:
        why = one_line(error).replace(self._url, "…")  # the key in the address is nobody's business
        return f"the RTMP server cannot be reached ({why}): check the address and the key; it is tried again"


class Mp4Muxer(PacketMuxer):
    """A recording: fragments in ``<name>.part.mp4``, the final file at the end.

    ``resume``: what a predecessor wrote of it is kept as an earlier piece, and joined at the end.
    """

    format = "mp4"

    def __init__(self, spec: Mp4Sink, resume: bool = False) -> None:
        super().__init__()
        self._resume = resume
        self._final = Path(spec.path)
        self._part = part_path(self._final)

    def place(self) -> tuple[str, dict[str, str]]:
        self._final.parent.mkdir(parents=True, exist_ok=True)
        if os.path.lexists(self._final):
            raise SinkError(f"{self._final.name} is there already: choose another name")
        if self._resume:
            set_aside(self._part)
        else:
            keep_foreign(self._part)
        return str(self._part), PART_OPTIONS

    def close(self) -> str:
        super().close()
        try:
            pictures = finalise_part(self._part, self._final)
        except MediaError as error:
            if "no picture" in str(error):
                discard(self._part)
                return ""
            raise SinkError(str(error)) from None
        return f"{pictures} frames in {self._final}"

    def broken(self, error: BaseException) -> str:
        return f"{self._final.name}: cannot be written ({one_line(error)}); free disk space, or choose another folder"
