"""A sink that only lets the frames be paced and counted."""

from __future__ import annotations

from fractions import Fraction

from services.egress.sinks.port import OutFrame
from shared.contracts.events import AudioCaptured


class NullSink:
    """Discards everything."""

    def expect_audio(self, expected: bool) -> None:
        """Nothing is prepared."""

    def write(self, frame: OutFrame) -> None:
        """Discarded."""

    def audio(self, part: AudioCaptured) -> None:
        """Discarded."""

    def still(self, until_s: Fraction) -> None:
        """Nothing is shown."""

    def finish(self) -> str:
        """Nothing was made."""
        return ""
