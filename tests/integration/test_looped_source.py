"""A looped file: round after round, timestamps ascend and nothing is left out."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

from services.ingest.sources.file import FileSource
from services.ingest.sources.looped import LoopedSource
from services.ingest.sources.port import Picture, Sound
from shared.contracts.commands import Fit
from tests.support.clips import Audio, make_clip


def test_three_rounds_ascend(tmp_path: Path) -> None:
    clip = make_clip(tmp_path / "a.mp4", frames=12, audio=Audio())
    source = LoopedSource(lambda: FileSource(clip, 96, 64, Fit.CROP, None, True))
    items = list(islice(source.read(), 200))
    source.close()
    pictures = [item for item in items if isinstance(item, Picture)]
    sounds = [item for item in items if isinstance(item, Sound)]
    assert len(pictures) > 36
    assert all(a.pts < b.pts for a, b in zip(pictures, pictures[1:], strict=False))
    assert all(a.dts < b.dts for a, b in zip(sounds, sounds[1:], strict=False))
