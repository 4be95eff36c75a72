"""A file that begins again at its end; its timestamps go on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from fractions import Fraction

from services.ingest.sources.file import FileSource
from services.ingest.sources.port import AudioTrack, Picture, Sound


class LoopedSource:
    """``open_it`` opens the file anew for each round. Raises SourceError when it cannot be opened or read any more."""

    def __init__(self, open_it: Callable[[], FileSource]) -> None:
        self._open_it = open_it
        self._file = open_it()
        self._size: tuple[int, int] | None = None  # None: that of the beginning
        self.time_base: Fraction = self._file.time_base
        self.audio: AudioTrack | None = self._file.audio

    def read(self) -> Iterator[Picture | Sound]:
        """Endless, unless a round gives no picture."""
        shift, last_dts = Fraction(0), None
        while True:
            end, pictures = Fraction(0), 0
            ticks = round(shift / self.time_base)
            sound_ticks = round(shift / self.audio.time_base) if self.audio is not None else 0
            for item in self._file.read():
                if isinstance(item, Picture):
                    pictures += 1
                    end = max(end, (item.pts + max(1, item.duration)) * self.time_base)
                    yield replace(item, pts=item.pts + ticks)
                elif self.audio is not None:
                    end = max(end, (item.pts + item.duration) * self.audio.time_base)
                    dts = item.dts + sound_ticks
                    if last_dts is None or dts > last_dts:  # an encoder's priming lies before a round's begin
                        last_dts = dts
                        yield replace(item, pts=item.pts + sound_ticks, dts=dts)
            if not pictures:
                return
            shift += end
            self._file.close()
            self._file = self._open_it()
            if self._size is not None:
                self._file.resize(*self._size)

    def resize(self, width: int, height: int) -> None:
        """Fit to another size from the next picture on, in every round."""
        self._size = (width, height)
        self._file.resize(width, height)

    def close(self) -> None:
        """Close the file."""
        self._file.close()
