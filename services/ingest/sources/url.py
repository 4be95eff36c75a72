"""What is pulled from an address: opened again with back-off when it breaks, whatever it has become by then."""

from __future__ import annotations

import logging
import random
import time
from collections import deque
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import av.error

from services.ingest.fit import Fitter
from services.ingest.links import Links
from services.ingest.sources.audio import PassedAudio, TranscodedAudio, choose_audio
from services.ingest.sources.port import AudioTrack, Picture, Sound, SourceError
from services.ingest.sources.url_opening import is_live, open_url
from shared.contracts.commands import Fit
from shared.contracts.events import EventKind
from shared.media.addresses import AddressError
from shared.media.errors import MediaError, one_line
from shared.media.probe import picture_stream

log = logging.getLogger(__name__)

BASE = Fraction(1, 90_000)
FIRST_WAIT_S, LONGEST_WAIT_S = 0.25, 8.0
LOOK_PACKETS = 200  # among so many packets at the start the first sound is looked for
Handler = PassedAudio | TranscodedAudio


class UrlSource:
    """RTMP, RTSP, HLS or a file by HTTP. ``live``: frames are stamped as they come, if the protocol is live too.

    After a break time goes on where it is by the wall clock. A file that broke is read over up to where it was.
    """

    def __init__(
        self,
        url: str,
        reconnect_s: float,
        width: int,
        height: int,
        fit: Fit,
        fps: float | None,
        with_audio: bool,
        links: Links,
    ) -> None:
        self._url, self._reconnect_s, self._links, self._with_audio = url, reconnect_s, links, with_audio
        self._live = is_live(url)  # frames are stamped as they come
        self._fitter = Fitter(width, height, fit)
        self._interval = 1 / Fraction(fps).limit_denominator(1001) if fps else Fraction(0)
        self._due = Fraction(0)
        self._began = time.monotonic()
        self._last = -1
        self._last_sound = -1
        self._shift: Fraction | None = None
        self._container: Any = None
        self._video: Any = None
        self._sound_stream: Any = None
        self._sound: Handler | None = None
        self._track: AudioTrack | None = None
        self._early: deque[Any] = deque()
        self.time_base = BASE
        self._start()

    def _start(self) -> None:
        """Raises SourceError when it cannot be opened now."""
        try:
            self._open(first=True)
        except (MediaError, OSError, av.error.FFmpegError) as error:
            self._hang_up()
            raise SourceError(f"the source cannot be opened: {one_line(error)}; check its address") from None

    @property
    def audio(self) -> AudioTrack | None:
        """The sound track that the source began with."""
        return self._track

    def resize(self, width: int, height: int) -> None:
        """Fit to another size from the next picture on."""
        self._fitter.resize(width, height)

    def close(self) -> None:
        """Hang up."""
        self._hang_up()

    def _hang_up(self) -> None:
        self._sound = self._sound_stream = self._video = None
        self._early.clear()
        if self._container is not None:
            self._container.close()
            self._container = None

    def read(self) -> Iterator[Picture | Sound]:
        """Until a file's end. Raises SourceError when a break lasts longer than ``reconnect_s``."""
        while True:
            reason = "it has ended"
            try:
                yield from self._read_on()
                if not self._live:
                    return
            except (MediaError, OSError, av.error.FFmpegError) as error:
                reason = (
                    "nothing comes from it" if isinstance(error, av.error.ExitError | TimeoutError) else one_line(error)
                )
            if self._links.stopped:
                return
            self._come_back(reason)
            if self._links.stopped:
                return

    def _come_back(self, reason: str) -> None:
        """Opens it again, waiting longer each time. Raises SourceError when that takes too long, or may not be."""
        self._hang_up()
        if self._reconnect_s <= 0:
            raise SourceError(f"the source broke off: {reason}")
        self._links.tell(EventKind.SOURCE_LOST, reason)
        until, wait = time.monotonic() + self._reconnect_s, FIRST_WAIT_S
        while self._links.wait(wait * random.uniform(0.5, 1.0)):
            try:
                self._open(first=False)
            except AddressError as error:
                raise SourceError(str(error)) from None
            except (MediaError, OSError, av.error.FFmpegError) as error:
                self._hang_up()
                reason = one_line(error)
            else:
                self._links.tell(EventKind.SOURCE_BACK, "the picture goes on")
                return
            if time.monotonic() > until:
                raise SourceError(f"the source did not come back within {self._reconnect_s:.0f} s: {reason}")
            wait = min(LONGEST_WAIT_S, wait * 2)

    def _connect(self) -> Any:
        return open_url(self._url, self._links.rules, lambda: self._links.stopped)

    def _open(self, *, first: bool) -> None:
        self._container = self._connect()
        self._video = picture_stream(self._container)
        self._video.codec_context.thread_count = 1  # frame threads hold frames back
        if self._live or first:
            self._shift = None
        if self._with_audio and self._container.streams.audio and (first or self._track is not None):
            self._open_sound(first)

    def _open_sound(self, first: bool) -> None:
        stream = self._container.streams.audio[0]
        for packet in self._container.demux(self._video, stream):
            if packet.size:
                self._early.append(packet)
            if packet.size and packet.stream_index == stream.index:
                handler = choose_audio(stream, packet)
                if handler is not None and (first or self._same(handler.track)):
                    self._sound, self._sound_stream = handler, stream
                    self._track = self._track or handler.track
                elif not first:
                    self._links.tell(EventKind.WARNING, "its sound has changed: from here on there is none")
                return
            if len(self._early) >= LOOK_PACKETS:
                return

    def _same(self, track: AudioTrack) -> bool:
        old = self._track
        return old is not None and all(
            getattr(old, name) == getattr(track, name)
            for name in ("codec", "sample_rate", "layout", "time_base", "extradata")
        )

    def _read_on(self) -> Iterator[Picture | Sound]:
        for packet in self._packets():
            if self._sound_stream is not None and packet.stream_index == self._sound_stream.index:
                yield from self._sounds(packet)
            elif packet.stream_index == self._video.index:
                try:
                    frames = packet.decode()
                except av.error.InvalidDataError as error:  # the next key frame mends it
                    log.debug("a frame does not decode: %s", error)
                    continue
                for frame in frames:
                    yield from self._pictures(frame)

    def _packets(self) -> Iterator[Any]:
        while self._early:
            yield self._early.popleft()
        yield from self._container.demux(*self._container.streams.video, *self._container.streams.audio)

    def _pictures(self, frame: Any) -> Iterator[Picture]:
        if frame.pts is None:
            return
        at = self._shifted(frame.pts * Fraction(frame.time_base))
        pts = round(at / BASE)
        if pts <= self._last:  # read over after a break, or a clock that ran back
            return
        if self._interval:
            if at < self._due - self._interval / 4:
                return
            self._due = max(self._due + self._interval, at + self._interval / 2)
        self._last = pts
        duration = round((frame.duration or 0) * Fraction(frame.time_base) / BASE)
        pixels = self._fitter.fit(frame, self._video.sample_aspect_ratio)
        yield Picture(pts, duration, pixels, time.time_ns() if self._live else 0)

    def _sounds(self, packet: Any) -> Iterator[Sound]:
        assert self._sound is not None
        assert self._track is not None
        for sound in self._sound.feed(packet):
            shift = round(self._shifted(sound.dts * self._track.time_base) / self._track.time_base) - sound.dts
            if sound.dts + shift > self._last_sound:
                self._last_sound = sound.dts + shift
                yield Sound(sound.pts + shift, sound.dts + shift, sound.duration, sound.data)

    def _shifted(self, seconds: Fraction) -> Fraction:
        """Seconds of the source → of the stream. A connection's first moment is now."""
        if self._shift is None:
            now = Fraction(time.monotonic() - self._began).limit_denominator(1000) if self._last >= 0 else Fraction(0)
            self._shift = now - seconds
        return seconds + self._shift
