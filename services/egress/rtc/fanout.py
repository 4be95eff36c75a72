"""One encode, many viewers: each has a bounded queue; one that does not keep up costs the others nothing. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

MAX_VIDEO = 64
MAX_AUDIO = 200
KEY_EVERY_NS = 500_000_000  # a key frame is large: one in this time will do for whoever asked in between


@dataclass(frozen=True, slots=True)
class Encoded:
    """A packet of H.264 (90 kHz) or Opus (48 kHz), ``pts`` in those ticks."""

    data: bytes
    pts: int
    key: bool = True


class Queue:
    """One viewer's packets of one kind. Video that overflows is dropped up to the next key frame."""

    def __init__(self, size: int, *, needs_key: bool) -> None:
        self._size, self._by_key = size, needs_key
        self._waits_for_key = needs_key
        self._items: deque[Encoded] = deque()
        self.dropped = 0
        self.wake: Callable[[], None] = lambda: None

    def put(self, packet: Encoded) -> bool:
        """One more. False: a key frame is needed to go on."""
        if len(self._items) >= self._size:
            if self._by_key:
                self.dropped += len(self._items)
                self._items.clear()
                self._waits_for_key = True
            else:
                self._items.popleft()
                self.dropped += 1
        if self._waits_for_key and not packet.key:
            self.dropped += 1
            return False
        self._waits_for_key = False
        self._items.append(packet)
        self.wake()
        return True

    def pop(self) -> Encoded | None:
        """The next one, if there is one."""
        return self._items.popleft() if self._items else None


class Fanout:
    """All viewers of a stream. ``wants_key`` says once when the next frame is to be a key frame."""

    def __init__(self) -> None:
        self._video: dict[str, Queue] = {}
        self._audio: dict[str, Queue] = {}
        self._key_wanted = False
        self._key_given_ns = -KEY_EVERY_NS
        self.encoded = 0

    def __len__(self) -> int:
        return len(self._video)

    def join(self, viewer: str) -> tuple[Queue, Queue]:
        """A viewer's queues (video, audio). It begins with a key frame."""
        self._video[viewer] = Queue(MAX_VIDEO, needs_key=True)
        self._audio[viewer] = Queue(MAX_AUDIO, needs_key=False)
        self._key_wanted = True
        return self._video[viewer], self._audio[viewer]

    def leave(self, viewer: str) -> None:
        """A viewer is gone."""
        self._video.pop(viewer, None)
        self._audio.pop(viewer, None)

    def want_key(self) -> None:
        """A viewer lost the picture."""
        self._key_wanted = True

    def takes_key(self, now_ns: int) -> bool:
        """Whether the next frame is to be a key frame. Asked once a frame."""
        if not self._key_wanted or now_ns - self._key_given_ns < KEY_EVERY_NS:
            return False
        self._key_wanted, self._key_given_ns = False, now_ns
        return True

    def video(self, packet: Encoded) -> None:
        """A frame for everyone."""
        self.encoded += 1
        for queue in self._video.values():
            if not queue.put(packet):
                self._key_wanted = True

    def audio(self, packet: Encoded) -> None:
        """Sound for everyone."""
        for queue in self._audio.values():
            queue.put(packet)
