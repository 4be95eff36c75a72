"""The frames of one stream that wait to be shown, and how their source moves."""

from __future__ import annotations

import logging
from collections.abc import Callable
from fractions import Fraction

import numpy as np

from services.egress.core import Emit
from services.egress.sinks.port import OutFrame
from shared.contracts.events import ChunkCaptured, ChunkStamp
from shared.media.flow import Flow, FlowError
from shared.media.steadying import Place

log = logging.getLogger(__name__)


class Waiting:
    """By chunk; no more of them than are under way. A flow that does not fit its frames is left out, and counts."""

    def __init__(self, count: Callable[[str], None]) -> None:
        self._count = count
        self._pixels: dict[int, tuple[np.ndarray, ChunkStamp]] = {}
        self._flows: dict[int, bytes] = {}
        self._read: tuple[int, Flow | None] = (-1, None)  # of the chunk that is being shown
        self._complained = False

    def captured(self, message: ChunkCaptured) -> None:
        """A chunk was numbered."""
        if message.flow:
            self._flows[message.stamp.chunk] = message.flow

    def came(self, stamp: ChunkStamp, pixels: np.ndarray) -> None:
        """Its frames are here."""
        self._pixels[stamp.chunk] = (pixels, stamp)

    def stamp(self, chunk: int) -> ChunkStamp:
        """That of a chunk whose frames are here."""
        return self._pixels[chunk][1]

    def frame(self, emit: Emit, now: int) -> OutFrame:
        """What the sinks are given; ``now`` in UNIX ns."""
        pixels, stamp = self._pixels[emit.chunk]
        last = emit.position == len(stamp.frames) - 1
        frame = emit.frame
        return OutFrame(
            pixels[emit.position],
            frame.pts,
            frame.duration,
            Fraction(*stamp.time_base),
            emit.chunk,
            frame.captured_ns,
            now,
            Place(emit.chunk, emit.position, last),
            self._flow(stamp, pixels),
        )

    def forget(self, chunk: int) -> None:
        """It has its verdict."""
        self._pixels.pop(chunk, None)
        self._flows.pop(chunk, None)

    def clear(self) -> None:
        """Nothing more is shown."""
        self._pixels.clear()
        self._flows.clear()

    def _flow(self, stamp: ChunkStamp, pixels: np.ndarray) -> Flow | None:
        if self._read[0] != stamp.chunk:
            for older in [chunk for chunk in self._flows if chunk < stamp.chunk]:
                del self._flows[older]  # told of after its verdict
            self._read = (stamp.chunk, self._parsed(stamp, pixels))
        return self._read[1]

    def _parsed(self, stamp: ChunkStamp, pixels: np.ndarray) -> Flow | None:
        data = self._flows.get(stamp.chunk)
        if not data:
            return None
        try:
            return Flow.from_bytes(data, *pixels.shape[:3])
        except FlowError as error:
            self._count("flow_unusable")
            if not self._complained:
                log.warning("stream %s: chunk %d is not steadied: %s", stamp.stream, stamp.chunk, error)
            self._complained = True
            return None
