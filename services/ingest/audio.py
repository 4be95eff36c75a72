"""Batches sound for the bus: up to the end of each chunk, in parts that fit a message."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from fractions import Fraction

from services.ingest.sources.port import AudioTrack, Sound
from shared.contracts.events import AudioCaptured

MAX_PART_BYTES = 500_000


class AudioBatcher:
    """Packets of one track on their way out. ``seq`` is dense; ``after_dts`` skips what a predecessor sent."""

    def __init__(self, stream: str, track: AudioTrack, *, seq: int = 0, after_dts: int | None = None) -> None:
        self._stream, self._track = stream, track
        self.parts = seq
        self.last_dts = after_dts
        self._waiting: deque[Sound] = deque()
        self._bytes = 0

    def add(self, sound: Sound) -> None:
        """A packet. One that does not follow the last (a source clock that ran back) is left out."""
        if self.last_dts is not None and sound.dts <= self.last_dts:
            return
        self.last_dts = sound.dts
        self._waiting.append(sound)
        self._bytes += len(sound.data)

    @property
    def is_full(self) -> bool:
        """Whether a whole part waits, chunk or not."""
        return self._bytes >= MAX_PART_BYTES

    def announce(self, epoch: int) -> AudioCaptured:
        """A part without packets: tells whoever muxes what is to come."""
        return self._part(epoch, [])

    def take(self, epoch: int, until_s: Fraction | None = None) -> Iterator[AudioCaptured]:
        """Parts with every packet that starts before ``until_s`` (None: all)."""
        packets: list[Sound] = []
        size = 0
        while self._waiting:
            sound = self._waiting[0]
            if until_s is not None and sound.dts * self._track.time_base >= until_s:
                break
            if packets and size + len(sound.data) > MAX_PART_BYTES:
                yield self._part(epoch, packets)
                packets, size = [], 0
            packets.append(self._waiting.popleft())
            size += len(sound.data)
            self._bytes -= len(sound.data)
        if packets:
            yield self._part(epoch, packets)

    def _part(self, epoch: int, packets: list[Sound]) -> AudioCaptured:
        track = self._track
        part = AudioCaptured(
            stream=self._stream,
            epoch=epoch,
            seq=self.parts,
            codec=track.codec,
            sample_rate=track.sample_rate,
            layout=track.layout,
            time_base=(track.time_base.numerator, track.time_base.denominator),
            extradata=track.extradata,
            packets=tuple((sound.pts, sound.dts, sound.duration, sound.data) for sound in packets),
            header=track.header,
        )
        self.parts += 1
        return part
