"""The MP4 sink: exact timestamps, its index in front, playable after a kill, no file without a picture."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest

from services.egress.audio import AudioOrder
from services.egress.ledger import drop_key
from services.egress.sinks.mp4 import Mp4Sink
from services.egress.sinks.opening import open_sinks
from services.egress.sinks.port import OutFrame, SinkError
from shared.contracts.commands import FileSource, StreamSpec
from shared.contracts.commands import Mp4Sink as Mp4Spec
from shared.contracts.events import AudioCaptured
from shared.media.errors import MediaError
from shared.media.salvage import finalise_part, part_path
from tests.support import clips

BASE = Fraction(1, 90_000)
RATE = Fraction(16)


def frame(index: int, pts: int | None = None, base: Fraction = BASE) -> OutFrame:
    return OutFrame(clips.moving(index, 96, 64), index * 5625 if pts is None else pts, 5625, base)


def sink(path: Path, **options: bool) -> Mp4Sink:
    made = Mp4Sink(path, 96, 64, RATE, **options)
    made.expect_audio(False)
    return made


@pytest.mark.parametrize(
    ("base", "pts"),
    [
        (BASE, [0, 3003, 4505, 9009, 90_000, 93_003]),
        (Fraction(1, 1000), [0, 33, 67, 100, 2000]),
        (Fraction(1, 16_000), [0, 1000, 2000, 3000]),
        (Fraction(1001, 30_000), [0, 1, 2, 5, 6]),
        (BASE, [126_000, 129_000, 132_000]),
        (Fraction(1001, 24_000_000), [0, 1000, 2000]),
    ],
    ids=["vfr", "mkv", "constant", "ntsc", "starts-late", "constant-ntsc"],
)
def test_every_timestamp_is_the_source_s_own(tmp_path: Path, base: Fraction, pts: list[int]) -> None:
    out = sink(tmp_path / "out.mp4")
    for index, stamp in enumerate(pts):
        out.write(frame(index, stamp, base))
    out.finish()
    assert clips.timestamps(tmp_path / "out.mp4") == [stamp * base for stamp in pts]


def test_the_file_is_h264_with_its_index_in_front_and_true_colours(tmp_path: Path) -> None:
    out = sink(tmp_path / "out.mp4")
    for index in range(8):
        out.write(OutFrame(clips.corners(96, 64), index * 5625, 5625, BASE))
    assert out.finish() == f"8 frames in {tmp_path / 'out.mp4'}"
    assert clips.boxes(tmp_path / "out.mp4")[:2] == ["ftyp", "moov"]
    assert sorted(os.listdir(tmp_path)) == ["out.mp4"]
    with av.open(str(tmp_path / "out.mp4")) as container:
        video = container.streams.video[0]
        assert (video.codec_context.name, video.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert video.codec_context.colorspace == 1, "BT.709, and says so"
        assert video.duration is not None
        assert video.time_base is not None
        assert float(video.duration * video.time_base) == pytest.approx(0.5, abs=0.01)
        picture = next(container.decode(video=0)).to_ndarray(format="rgb24")
    for y, x, colour in ((16, 24, (220, 30, 30)), (16, 72, (30, 220, 30)), (48, 24, (30, 30, 220))):
        assert np.abs(np.subtract(picture[y, x].astype(int), colour)).max() < 12


def test_nothing_appears_under_the_final_name_before_the_end(tmp_path: Path) -> None:
    (tmp_path / "out.mp4").write_text("the file of an earlier run")
    out = sink(tmp_path / "out.mp4")
    for index in range(8):
        out.write(frame(index))
    assert (tmp_path / "out.mp4").read_text() == "the file of an earlier run"
    out.finish()
    assert len(clips.timestamps(tmp_path / "out.mp4")) == 8


def test_no_picture_no_file(tmp_path: Path) -> None:
    out = sink(tmp_path / "out.mp4")
    assert out.finish() == ""
    assert os.listdir(tmp_path) == []


KILLED = """
import sys, time
from fractions import Fraction
from pathlib import Path
sys.path.insert(0, {root!r})
from services.egress.sinks.mp4 import Mp4Sink
from tests.unit.test_egress_mp4 import frame
sink = Mp4Sink(Path({path!r}), 96, 64, Fraction(16))
sink.expect_audio(False)
for index in range(64):
    sink.write(frame(index))
print("written", flush=True)
time.sleep(60)
"""


def test_a_killed_recording_plays_and_becomes_the_file(tmp_path: Path) -> None:
    path = tmp_path / "out.mp4"
    code = KILLED.format(root=str(Path(__file__).parents[2]), path=str(path))
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == b"written"
        process.send_signal(signal.SIGKILL)
    assert not path.exists()
    playable = clips.timestamps(part_path(path))
    assert len(playable) >= 64 - 16, "at most one fragment is missing"
    assert playable[:3] == [0, Fraction(1, 16), Fraction(2, 16)]
    assert finalise_part(part_path(path), path) == len(playable)
    assert clips.timestamps(path) == playable
    assert clips.boxes(path)[:2] == ["ftyp", "moov"]
    assert os.listdir(tmp_path) == ["out.mp4"]


def test_a_part_cut_at_any_byte_is_saved_up_to_there_or_told_to_be_empty(tmp_path: Path) -> None:
    out = sink(tmp_path / "out.mp4")
    for index in range(48):
        out.write(frame(index))
    data = part_path(tmp_path / "out.mp4").read_bytes()
    out.finish()
    kept: list[int] = []
    for share in (0.05, 0.3, 0.61, 0.9, 1.0):
        part = tmp_path / "cut.part.mp4"
        part.write_bytes(data[: int(len(data) * share)])
        try:
            kept.append(finalise_part(part, tmp_path / "cut.mp4"))
        except MediaError:
            kept.append(0)
    assert kept == sorted(kept)
    assert kept[-1] > 30
    part.write_bytes(b"")
    with pytest.raises(MediaError, match="nothing to save"):
        finalise_part(part, tmp_path / "empty.mp4")


def test_a_restarted_recording_joins_its_pieces(tmp_path: Path) -> None:
    path = tmp_path / "out.mp4"
    first = sink(path)
    for index in range(32):
        first.write(frame(index))
    written = len(clips.timestamps(part_path(path)))
    second = sink(path, resume=True)
    for index in range(40, 56):
        second.write(frame(index))
    second.finish()
    times = clips.timestamps(path)
    assert times == [Fraction(index, 16) for index in (*range(written), *range(40, 56))]
    assert os.listdir(tmp_path) == ["out.mp4"]


def test_a_piece_that_begins_at_nought_again_follows_the_one_before(tmp_path: Path) -> None:
    """A recording that was added while the stream ran counts from its first picture, in each of its pieces."""
    path = tmp_path / "out.mp4"
    part = part_path(path)
    clips.make_clip(part.with_name("out.part-0.mp4"), frames=24, fps=16, audio=True)
    clips.make_clip(part, frames=16, fps=16, audio=True)
    assert finalise_part(part, path) == 40
    times = clips.timestamps(path)
    gaps = [float(b - a) for a, b in pairwise(times)]
    assert max(gaps[:23] + gaps[24:]) < 0.07
    assert 0 < gaps[23] < 0.2, "the second follows at once"
    sound = clips.timestamps(path, "audio")
    assert abs(float(sound[-1] - times[-1])) < 0.15, "both tracks alike"


def test_a_destination_that_cannot_be_written_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(SinkError, match="folder does not exist"):
        sink(tmp_path / "no" / "out.mp4")
    with pytest.raises(SinkError, match="is a folder"):
        sink(tmp_path)


@pytest.mark.parametrize("name", ["clip.mp4", "clip.part.mp4", "clip.part-0.mp4"])
def test_the_stream_s_own_source_is_never_written_over(tmp_path: Path, name: str) -> None:
    source = clips.make_clip(tmp_path / name, frames=6)
    data = source.read_bytes()
    link = tmp_path / "link.mp4"
    link.symlink_to(source)
    for path in (source, link):
        spec = StreamSpec(
            source=FileSource(path=str(path)), sinks=(Mp4Spec(path=str(tmp_path / "clip.mp4")),), prompt="a drawing"
        )
        with pytest.raises(SinkError, match="overwrite its own source"):
            open_sinks(spec, 96, 64, (tmp_path,), (), resume=False)
    assert source.read_bytes() == data
    assert sorted(os.listdir(tmp_path)) == sorted([name, "link.mp4"])


def test_recordings_that_are_not_provably_its_own_are_kept(tmp_path: Path) -> None:
    (tmp_path / "out.part.mp4").write_bytes(b"of a run that was killed")
    (tmp_path / "out.part-0.mp4").write_bytes(b"its first piece")
    out = sink(tmp_path / "out.mp4")
    for index in range(4):
        out.write(frame(index))
    out.finish()
    assert len(clips.timestamps(tmp_path / "out.mp4")) == 4
    assert (tmp_path / "out.part.kept-0.mp4").read_bytes() == b"its first piece"
    assert (tmp_path / "out.part.kept-1.mp4").read_bytes() == b"of a run that was killed"
    assert len(os.listdir(tmp_path)) == 3
    (tmp_path / "out.part.mp4").write_bytes(b"")
    assert sink(tmp_path / "out.mp4").finish() == "", "an empty one holds nothing to keep"
    assert len(os.listdir(tmp_path)) == 3


def part(seq: int) -> AudioCaptured:
    return AudioCaptured(
        stream="s",
        epoch=1,
        seq=seq,
        codec="aac",
        sample_rate=48_000,
        layout="stereo",
        time_base=(1, 48_000),
        extradata=None,
        packets=(),
    )


def test_sound_that_was_announced_and_never_comes_does_not_hold_the_picture_for_ever(tmp_path: Path) -> None:
    out = Mp4Sink(tmp_path / "out.mp4", 96, 64, RATE)
    out.expect_audio(True)
    for index in range(80):
        out.write(frame(index))
    out.finish()
    assert len(clips.timestamps(tmp_path / "out.mp4")) == 80


def test_a_sound_track_without_a_packet_does_no_harm(tmp_path: Path) -> None:
    from services.ingest.sources.file import FileSource
    from shared.contracts.commands import Fit

    clip = clips.make_clip(tmp_path / "in.mp4", audio=True)
    source = FileSource(clip, 96, 64, Fit.CROP, None, True)
    assert source.audio is not None
    out = Mp4Sink(tmp_path / "out.mp4", 96, 64, RATE)
    out.expect_audio(True)
    out.audio(part(0).model_copy(update={"header": source.audio.header}))
    source.close()
    for index in range(24):
        out.write(frame(index))
    out.finish()
    assert len(clips.timestamps(tmp_path / "out.mp4")) == 24


def test_sound_is_put_back_into_its_order_and_gaps_are_counted() -> None:
    order = AudioOrder()
    assert [p.seq for p in order.push(part(0))] == [0]
    assert order.push(part(2)) == []
    assert order.push(part(2)) == []
    assert [p.seq for p in order.push(part(1))] == [1, 2]
    assert order.repeated == 1
    out = [p.seq for seq in range(4, 14) for p in order.push(part(seq))]
    assert out == list(range(4, 14)), "part 3 is not waited for without end"
    assert order.lost == 1
    order.push(part(15))
    assert [p.seq for p in order.flush(17)] == [15]
    assert order.lost == 3


def test_a_failure_names_the_service_in_the_ledger() -> None:
    assert drop_key("worker-0 was restarted") == "worker:was restarted"
    assert drop_key("the pipeline fell over") == "scheduler:the pipeline fell over"
    assert drop_key("ingest-0 sent no heartbeat").startswith("scheduler:"), "its own totals are kept apart"
