"""All live sinks of one stream, as one sink of its sink thread: encodes each frame once, for whoever wants it."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import replace
from fractions import Fraction

from services.egress.fitted import fitted
from services.egress.live.feed import Feed, Told
from services.egress.live.h264 import SharedEncoder
from services.egress.live.muxers import Muxer
from services.egress.sinks.port import OutFrame
from shared.contracts.events import AudioCaptured
from shared.contracts.sinks import HlsSink, NatsSink, Sink, SinkFigures
from shared.media.jpeg import JpegEncoder

log = logging.getLogger(__name__)

LOOKING_S = 5.0
MAX_FEEDS = 16
MAX_PUBLISHING = 4
MAX_SOUND = 512  # parts that wait for the picture of their time

Publish = Callable[[OutFrame, bytes, str], Awaitable[None]]
"""(frame, data, format) → on the bus."""
Hear = Callable[[Told], None]
"""News of a sink, called on the loop."""


class Fanout:
    """``add``, ``remove`` and ``look`` are called on the loop; the rest in the sink thread. Nothing here ever raises there.

    A sink that is added begins with the next frame, which becomes a keyframe. Nobody there: nothing is encoded.
    """

    def __init__(
        self, size: tuple[int, int], rate: Fraction, encoder: Callable[[], str], publish: Publish, hear: Hear
    ) -> None:
        self._size, self._rate, self._encoder_name = size, rate, encoder
        self._publish, self._hear = publish, hear
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        self._feeds: dict[str, Feed] = {}
        self._leaving: list[Feed] = []  # removed, and not ended yet
        self._frames: dict[str, NatsSink] = {}  # sinks that take whole pictures
        self._sent: dict[str, list[int]] = {}  # … and the pictures and bytes that each was sent, and missed
        self._encoder: SharedEncoder | None = None
        self._jpegs: dict[int, JpegEncoder] = {}
        self._header = b""
        self._sound: deque[AudioCaptured] = deque()
        self._segment_s = 0.0
        self._keyed: Fraction | None = None
        self._looking_until = 0.0
        self._gap_s = 0.0
        self._jpeg_at = 0.0
        self._publishing: set[asyncio.Task[None]] = set()
        self.counters: dict[str, int] = {}

    # --- on the loop -------------------------------------------------------------------------------------------------

    def add(self, sink: Sink, make: Callable[[], Muxer] | None) -> None:
        """One more; ``make`` gives its muxer, None for one that takes whole pictures."""
        with self._lock:
            if make is None:
                assert isinstance(sink, NatsSink)
                self._frames[sink.id], self._sent[sink.id] = sink, [0, 0, 0]
                return
            if self._encoder is None:
                self._encoder = SharedEncoder(*self._size, self._rate, self._encoder_name)
            if isinstance(sink, HlsSink):
                self._segment_s = min(self._segment_s or sink.segment_s, sink.segment_s)
            self._feeds[sink.id] = Feed(sink.id, make, self._encoder, self._tell, sink.kind)

    def remove(self, name: str) -> Feed | None:
        """Finish one; the end waits for it. None for one that takes whole pictures, or is not here."""
        with self._lock:
            self._frames.pop(name, None)
            self._sent.pop(name, None)
            feed = self._feeds.pop(name, None)
            if feed is not None:
                self._leaving = [*(other for other in self._leaving if not other.join(0)), feed]
        if feed is not None:
            feed.end()
        return feed

    def resize(self, width: int, height: int) -> list[str]:
        """The stream has another size. Ids of the sinks that keep the one they were opened with; none: the next has the new."""
        with self._lock:
            self._size = (width, height)
            if not self._feeds:
                self._encoder = None
            keeps = self._encoder is not None and self._encoder.size != self._size
            return list(self._feeds) if keeps else []

    def has(self, name: str) -> bool:
        """Whether there is a sink of that id."""
        return name in self._feeds or name in self._frames

    def look(self, max_fps: float) -> None:
        """Somebody looks: JPEGs are published for a while."""
        now = time.monotonic()
        gap = 0.9 / max_fps
        self._gap_s = gap if now > self._looking_until else min(self._gap_s, gap)
        self._looking_until = now + LOOKING_S

    def figures(self) -> list[SinkFigures]:
        """How every sink fares."""
        found = [feed.figures() for feed in list(self._feeds.values())]
        for name in list(self._frames):
            frames, size, missed = self._sent.get(name, (0, 0, 0))
            found.append(SinkFigures(id=name, sink_kind="nats", frames=frames, bytes=size, dropped=missed))
        return found

    # --- in the sink thread ------------------------------------------------------------------------------------------

    def expect_audio(self, expected: bool) -> None:
        """Whether the source has sound: the header of its first part tells all."""

    def write(self, frame: OutFrame) -> None:
        """One frame."""
        with self._lock:
            feeds, pictures = list(self._feeds.values()), list(self._frames.values())
        try:
            if feeds:
                self._encode(frame, feeds)
            self._pictures(frame, pictures)
            self._release(feeds, frame.pts * frame.time_base)
        except Exception as error:  # whatever it is, the stream's other sinks go on
            if not self.counters.get("frames_not_encoded"):
                log.exception("a frame was not encoded: %s", error)
            self._count("frames_not_encoded")

    def audio(self, part: AudioCaptured) -> None:
        """Sound, in order. It is captured long before its picture is made: a sink that begins then must have it still."""
        self._header = part.header or self._header
        self._sound.append(part)
        if len(self._sound) > MAX_SOUND:
            with self._lock:
                feeds = list(self._feeds.values())
            self._hand_sound(feeds, self._sound.popleft())

    def still(self, until_s: Fraction) -> None:
        """The sound up to there."""
        with self._lock:
            feeds = list(self._feeds.values())
        self._release(feeds, until_s)

    def finish(self) -> str:
        """End every sink, and wait for those that were removed."""
        with self._lock:
            feeds, leaving = list(self._feeds.values()), list(self._leaving)
        self._release(feeds, None)
        for feed in feeds:
            feed.end()
        since = time.monotonic()
        for feed in leaving + feeds:
            if not feed.join(max(0.1, since + feed.patience_s - time.monotonic())):
                log.warning("sink %s did not end within %g s", feed.name, feed.patience_s)
        return "; ".join(feed.made for feed in feeds if feed.made)

    def _encode(self, frame: OutFrame, feeds: list[Feed]) -> None:
        assert self._encoder is not None
        at = frame.pts * frame.time_base
        due = self._segment_s > 0 and (self._keyed is None or at - self._keyed >= self._segment_s - 0.001)
        key = due or any(feed.wants_key for feed in feeds)
        if key:
            self._keyed = at
        frame = replace(frame, pixels=fitted(frame.pixels, *self._encoder.size))
        for packet in self._encoder.encode(frame, key):
            for feed in feeds:
                feed.put_video(packet, self._header)

    def _release(self, feeds: list[Feed], shown_s: Fraction | None) -> None:
        """Sound up to the picture that is shown; None: all of it."""
        while self._sound:
            part = self._sound[0]
            if shown_s is not None and part.packets and part.packets[-1][0] * Fraction(*part.time_base) > shown_s:
                return
            self._hand_sound(feeds, self._sound.popleft())

    def _hand_sound(self, feeds: list[Feed], part: AudioCaptured) -> None:
        for feed in feeds:
            feed.put_audio(part, self._header)

    def _pictures(self, frame: OutFrame, sinks: list[NatsSink]) -> None:
        now = time.monotonic()
        looking = now < self._looking_until and now - self._jpeg_at >= self._gap_s
        wanted = {(sink.format, sink.quality) for sink in sinks}
        if looking and not any(format_ == "jpeg" for format_, _ in wanted):
            wanted.add(("jpeg", 80))
        if looking:
            self._jpeg_at = now
        for format_, quality in wanted:
            if format_ == "rgb24":
                self._send(frame, frame.pixels.tobytes(), format_)
            else:
                encoder = self._jpegs.setdefault(quality, JpegEncoder(quality))
                self._send(frame, encoder.encode(frame.pixels), format_)
                self._count("jpegs")

    def _send(self, frame: OutFrame, data: bytes, format_: str) -> None:
        try:
            self._loop.call_soon_threadsafe(self._start_publishing, frame, data, format_)
        except RuntimeError:  # the loop is closed
            return

    def _start_publishing(self, frame: OutFrame, data: bytes, format_: str) -> None:
        full = len(self._publishing) >= MAX_PUBLISHING
        for name, sink in self._frames.items():
            if sink.format == format_ and (sent := self._sent.get(name)) is not None:
                sent[0] += not full
                sent[1] += 0 if full else len(data)
                sent[2] += full
        if full:
            self._count("pictures_dropped")
            return
        task = asyncio.ensure_future(self._publish(frame, data, format_))
        self._publishing.add(task)
        task.add_done_callback(self._publishing.discard)

    def _tell(self, told: Told) -> None:
        try:
            self._loop.call_soon_threadsafe(self._hear, told)
        except RuntimeError:
            return

    def _count(self, name: str) -> None:
        self.counters[name] = self.counters.get(name, 0) + 1
