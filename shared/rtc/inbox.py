"""The bounded hand-over of encoded frames from the event loop to the reader's thread: the newest win."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

MAX_FRAMES = 30  # a second of video that waits to be decoded is too much
MAX_SOUNDS = 256


@dataclass(frozen=True, slots=True)
class EncodedFrame:
    """A frame to be decoded. ``session`` tells publishers apart: a new one has a decoder of its own."""

    session: str
    codec: str
    data: bytes
    captured_ns: int
    key: bool


@dataclass(frozen=True, slots=True)
class EncodedSound:
    """An Opus packet."""

    session: str
    data: bytes
    captured_ns: int
    timestamp: int  # RTP's, 48 kHz


@dataclass(frozen=True, slots=True)
class Over:
    """Nothing more comes; ``error`` is one line when that is not as it should be."""

    error: str | None = None


Item = EncodedFrame | EncodedSound | Over


class Inbox:
    """One stream's. A full queue of frames is emptied, and what comes is left out until a key frame (``ask_key``)."""

    def __init__(self) -> None:
        self._items: deque[Item] = deque()
        self._frames = self._sounds = 0
        self._changed = threading.Condition()
        self._over: Over | None = None
        self._wait_for_key = False
        self.ask_key: Callable[[], None] = lambda: None  # on the loop's side
        self.dropped = 0
        self.sounds_dropped = 0
        self.with_sound = False  # whether the publisher has offered sound
        self.undecodable = False  # set by the thread: a frame did not decode

    def put(self, item: EncodedFrame | EncodedSound) -> None:
        """From the loop."""
        ask = left_out = False
        with self._changed:
            if self._over is not None:
                return
            if isinstance(item, EncodedSound):
                if self._sounds >= MAX_SOUNDS:
                    self.sounds_dropped += 1
                    return
                self._sounds += 1
            else:
                if self._frames >= MAX_FRAMES:
                    self._drop_frames()
                    ask = not item.key
                if self._wait_for_key and not item.key:
                    self.dropped += 1
                    left_out = True
                else:
                    self._wait_for_key = False
                    self._frames += 1
            if not left_out:
                self._items.append(item)
                self._changed.notify()
        if ask:
            self.ask_key()

    def end(self, error: str | None = None) -> None:
        """From the loop: nothing more comes. What waits is discarded."""
        with self._changed:
            self._over = self._over or Over(error)
            self._items.clear()
            self._changed.notify()

    def get(self) -> Item:
        """From the thread: the next item, whenever it comes."""
        with self._changed:
            self._changed.wait_for(lambda: self._items or self._over is not None)
            if self._over is not None:
                return self._over
            item = self._items.popleft()
            self._frames -= isinstance(item, EncodedFrame)
            self._sounds -= isinstance(item, EncodedSound)
            return item

    @property
    def waiting(self) -> int:
        """Frames that nobody has taken yet."""
        with self._changed:
            return self._frames

    def _drop_frames(self) -> None:
        self.dropped += self._frames
        self._items = deque(item for item in self._items if not isinstance(item, EncodedFrame))
        self._frames, self._wait_for_key = 0, True
