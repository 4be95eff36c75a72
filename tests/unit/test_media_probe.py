"""What a file holds, or one line that says why it will not do and what would."""

from __future__ import annotations

import os
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import pytest

from shared.media.paths import inside, parse_roots
from shared.media.probe import MediaError, probe
from tests.support import clips


def test_a_clip_is_described(tmp_path: Path) -> None:
    info = probe(clips.make_clip(tmp_path / "in.mp4", frames=12, fps=16, audio=True))
    assert (info.width, info.height, info.frames) == (96, 64, 12)
    assert info.fps == pytest.approx(16)
    assert info.duration_s == pytest.approx(0.75, abs=0.01)
    assert (info.has_audio, info.audio_codec) == (True, "aac")
    assert (info.rotation, info.variable_rate) == (0, False)
    assert info.time_base == Fraction(1, 90_000)


def test_rotation_and_pixel_aspect_are_in_the_size(tmp_path: Path) -> None:
    info = probe(clips.make_rotated_clip(tmp_path / "a.mp4"))
    assert (info.width, info.height, info.rotation) == (64, 96, 90)
    info = probe(clips.make_clip(tmp_path / "b.mp4", sample_aspect=Fraction(2, 1)))
    assert (info.width, info.height) == (192, 64)


def test_a_variable_rate_is_noticed(tmp_path: Path) -> None:
    assert probe(clips.make_vfr_clip(tmp_path / "in.mp4")).variable_rate


@pytest.mark.parametrize(
    ("name", "make", "words"),
    [
        ("missing.mp4", lambda path: None, "no such file"),
        ("folder", lambda path: path.mkdir(), "is a folder"),
        ("empty.mp4", lambda path: path.touch(), "is empty"),
        ("text.mp4", lambda path: path.write_text("not a video\n" * 99), "not a video file"),
        ("cut.mp4", clips.make_without_index, "without its index"),
        ("sound.m4a", clips.make_audio_only, "only sound"),
    ],
)
def test_what_will_not_do_is_told_in_one_line(
    tmp_path: Path, name: str, make: Callable[[Path], object], words: str
) -> None:
    make(tmp_path / name)
    with pytest.raises(MediaError, match=words) as error:
        probe(tmp_path / name)
    assert "\n" not in str(error.value)
    assert name in str(error.value)


NOBODY = 65534


def test_a_file_without_permission(tmp_path: Path) -> None:
    path = clips.make_clip(tmp_path / "in.mp4")
    path.chmod(0)
    root = os.geteuid() == 0
    if root:  # root may read everything: look at it as somebody else
        os.seteuid(NOBODY)
    try:
        with pytest.raises(MediaError, match=r"(?i)permission"):
            probe(path)
    finally:
        if root:
            os.seteuid(0)


def test_paths_stay_inside_their_roots(tmp_path: Path) -> None:
    media = tmp_path / "media"
    (media / "sub").mkdir(parents=True)
    roots = parse_roots(f"{media}{os.pathsep}")
    assert inside("sub/a.mp4", roots, verb="read") == media / "sub" / "a.mp4"
    assert inside(str(media / "a.mp4"), roots, verb="read") == media / "a.mp4"
    (media / "out").symlink_to(tmp_path)
    for bad in ("../a.mp4", "/etc/passwd", "out/a.mp4", "sub/../../a.mp4", f"{media}-other/a.mp4", "a\0b"):
        with pytest.raises(MediaError):
            inside(bad, roots, verb="read")
    with pytest.raises(MediaError, match="RHEOCAST_FILE_ROOTS"):
        inside("a.mp4", (), verb="read")
