"""A sound track's parameters as bytes: a tiny Matroska file with the track's header and its first packet.

Every codec keeps its parameters elsewhere (extradata, first packet, container fields). A muxer that opens this header
gets them all as a stream template, so packets can travel and be muxed elsewhere untouched.
"""

from __future__ import annotations

import io
from typing import Any

import av
import av.error
import numpy as np

from shared.media.errors import MediaError, one_line

MAX_HEADER_BYTES = 64 * 1024


def make_header(stream: Any, first_packet: bytes, duration: int) -> bytes:
    """The header of PyAV audio ``stream``; ``duration`` is the first packet's, in the stream's time base."""
    buffer = io.BytesIO()
    try:
        with av.open(buffer, mode="w", format="matroska") as container:
            track: Any = container.add_stream_from_template(stream)
            packet: Any = av.Packet(first_packet)
            packet.pts = packet.dts = 0
            packet.duration = duration
            packet.time_base = stream.time_base
            packet.is_keyframe = True
            packet.stream = track
            container.mux(packet)
    except (av.error.FFmpegError, ValueError) as error:
        raise MediaError(f"the sound track cannot be described ({one_line(error)})") from None
    data = buffer.getvalue()
    if len(data) > MAX_HEADER_BYTES:
        raise MediaError(f"the sound track's header is {len(data)} bytes long; at most {MAX_HEADER_BYTES} will do")
    return data


def make_encoded_header(codec: str, rate: int, layout: str, bit_rate: int, samples: np.ndarray) -> bytes:
    """The header of a track that is about to be encoded; ``samples`` is one float32 [channels, n] frame of silence."""
    buffer = io.BytesIO()
    with av.open(buffer, mode="w", format="matroska") as container:
        track: Any = container.add_stream(codec, rate=rate)
        track.codec_context.layout = layout
        track.codec_context.bit_rate = bit_rate
        frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout=layout)
        frame.sample_rate = rate
        frame.pts = 0
        container.mux(track.encode(frame))
        container.mux(track.encode(None))
    return buffer.getvalue()


class AudioTemplate:
    """An opened header. ``stream`` serves as template while this object lives."""

    def __init__(self, header: bytes) -> None:
        try:
            self._container: Any = av.open(io.BytesIO(header), mode="r", format="matroska")
            self.stream: Any = self._container.streams.audio[0]
        except (av.error.FFmpegError, IndexError) as error:
            raise MediaError(f"the sound track's header is unreadable ({one_line(error)})") from None

    def close(self) -> None:
        """Let the header go."""
        self._container.close()
