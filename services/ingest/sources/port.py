"""A source as the reader thread sees it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol

import numpy as np


class SourceError(Exception):
    """A source that cannot be opened, or broke while it was read. The message is one line."""


@dataclass(frozen=True, slots=True)
class AudioTrack:
    """Everything about a sound track that whoever muxes it needs. ``codec`` is FFmpeg's name."""

    codec: str
    sample_rate: int
    layout: str
    time_base: Fraction
    extradata: bytes | None
    header: bytes


@dataclass(frozen=True, slots=True)
class Picture:
    """A fitted frame: uint8 [height, width, 3] RGB, timestamp and duration (0: unknown) in the source's ticks.

    ``captured_ns`` (UNIX): when it was captured, from a source that gives it as it comes; 0: it plays by its timestamps.
    """

    pts: int
    duration: int
    pixels: np.ndarray
    captured_ns: int = 0


@dataclass(frozen=True, slots=True)
class Sound:
    """One encoded audio packet, timestamps in its track's ticks."""

    pts: int
    dts: int
    duration: int
    data: bytes


class Source(Protocol):
    """An opened source. All of it runs in one worker thread.

    ``read`` yields pictures and sound in about the order they play, timestamps strictly ascending per kind. It raises
    SourceError after the last good frame when the source broke.
    """

    @property
    def time_base(self) -> Fraction: ...

    @property
    def audio(self) -> AudioTrack | None: ...

    def read(self) -> Iterator[Picture | Sound]: ...

    def resize(self, width: int, height: int) -> None:
        """Pictures are fitted to this size from the next one on. Called in another thread than the rest."""
        ...

    def close(self) -> None: ...
