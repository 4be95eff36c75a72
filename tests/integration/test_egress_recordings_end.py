"""The end of a recording that takes long: the stream goes on, nobody is told too early, and a failed one is told as such."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.egress.live import feed, muxers
from services.egress.sinks import mp4
from shared.contracts.commands import Mode
from shared.contracts.events import EventKind
from shared.contracts.sinks import HlsSink, Mp4Sink, NullSink
from shared.contracts.sources import PatternSource
from shared.media.errors import MediaError
from shared.media.salvage import finalise_part
from tests.integration.test_live_sinks_odd import change, playing, times_of, until
from tests.support.media_bench import bench


class Gate:
    """Recordings are completed once it is open, or cannot be when it is told so."""

    def __init__(self) -> None:
        self.opened, self.reached, self.broken = threading.Event(), threading.Event(), False

    def finalise(self, part: Path, final: Path) -> int:
        self.reached.set()
        assert self.opened.wait(20)
        if self.broken:
            raise MediaError(f"{final.name}: cannot be written; free space")
        return finalise_part(part, final)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate()
    for module in (muxers, mp4):
        monkeypatch.setattr(module, "finalise_part", gate.finalise)
    yield gate
    gate.opened.set()


async def test_a_stream_goes_on_while_a_recording_that_was_removed_is_completed(
    tmp_path: Path, run_id: str, gate: Gate
) -> None:
    first, hls = Mp4Sink(id="mp4-1", path="whole.mp4"), HlsSink(id="hls", segment_s=0.4)
    async with playing(tmp_path, run_id, first, hls) as (media, stream):
        folder = tmp_path / "hls" / stream
        await until(lambda: len(list(folder.glob("*.m4s"))) >= 1)
        removal = asyncio.ensure_future(change(media, stream, remove="mp4-1"))
        await until(gate.reached.is_set)
        seen = len(list(folder.glob("*.m4s")))
        await until(lambda: len(list(folder.glob("*.m4s"))) >= seen + 2)
        assert not removal.done()
        gate.opened.set()
        assert (await removal).event is EventKind.APPLIED
        assert times_of(tmp_path / "whole.mp4")["video"]


@pytest.mark.parametrize("added", [False, True], ids=["from-the-start", "added"])
async def test_the_end_waits_for_a_recording_that_was_just_removed(
    tmp_path: Path, run_id: str, gate: Gate, added: bool
) -> None:
    async with bench(tmp_path, run_id) as media:
        rec = Mp4Sink(id="rec", path="rec.mp4")
        stream = await media.begin(PatternSource(), sinks=(NullSink() if added else rec,), mode=Mode.LIVE, fps=10)
        if added:
            assert (await change(media, stream, rec)).event is EventKind.APPLIED
        await media.wait_for_chunk()
        await asyncio.sleep(0.5)
        removal = asyncio.ensure_future(change(media, stream, remove="rec"))
        await until(gate.reached.is_set)
        for service in ("ingest", "egress"):
            await media.leave(service, stream)
        await asyncio.sleep(0.7)
        assert not media.ended.is_set(), "not told before the file is there"
        gate.opened.set()
        assert (await media.end()).event is EventKind.STOPPED
        assert times_of(tmp_path / "rec.mp4")["video"]
        assert (await removal).event is EventKind.APPLIED


@pytest.mark.parametrize("added", [False, True], ids=["from-the-start", "added"])
async def test_a_removed_recording_that_cannot_be_completed_is_told_and_costs_the_stream_nothing(
    tmp_path: Path, run_id: str, gate: Gate, added: bool
) -> None:
    rec = Mp4Sink(id="rec", path="rec.mp4")
    async with playing(tmp_path, run_id, NullSink() if added else rec) as (media, stream):
        if added:
            assert (await change(media, stream, rec)).event is EventKind.APPLIED
        await media.wait_for_chunk()
        await asyncio.sleep(0.5)
        gate.broken = True
        gate.opened.set()
        answer = await change(media, stream, remove="rec")
        assert (answer.event, answer.sink) == (EventKind.WARNING, "rec")
        assert "rec.mp4: cannot be written" in answer.reason
        await media.wait_for_chunk()
        await media.wait_for_chunk()


@pytest.mark.parametrize("added", [False, True], ids=["from-the-start", "added"])
async def test_an_id_is_free_once_its_recording_is_complete(
    tmp_path: Path, run_id: str, gate: Gate, added: bool
) -> None:
    rec, again = Mp4Sink(id="rec", path="rec.mp4"), Mp4Sink(id="rec", path="again.mp4")
    async with playing(tmp_path, run_id, NullSink() if added else rec) as (media, stream):
        if added:
            assert (await change(media, stream, rec)).event is EventKind.APPLIED
        await media.wait_for_chunk()
        await asyncio.sleep(0.5)
        removal = asyncio.ensure_future(change(media, stream, remove="rec"))
        await until(gate.reached.is_set)
        refused = await change(media, stream, again)
        assert (refused.event, refused.gone) == (EventKind.WARNING, True), "its place is free at the scheduler's, too"
        gate.opened.set()
        assert (await removal).event is EventKind.APPLIED
        assert (await change(media, stream, again)).event is EventKind.APPLIED


async def test_a_removal_while_the_stream_ends_is_answered_when_the_file_is_there(
    tmp_path: Path, run_id: str, gate: Gate
) -> None:
    async with bench(tmp_path, run_id) as media:
        rec = Mp4Sink(id="rec", path="rec.mp4")
        stream = await media.begin(PatternSource(), sinks=(rec,), mode=Mode.LIVE, fps=10)
        await media.wait_for_chunk()
        await asyncio.sleep(0.5)
        for service in ("ingest", "egress"):
            await media.leave(service, stream)
        await until(gate.reached.is_set)
        removal = asyncio.ensure_future(change(media, stream, remove="rec"))
        await asyncio.sleep(0.3)
        assert not removal.done()
        gate.opened.set()
        assert (await removal).event is EventKind.APPLIED
        assert (tmp_path / "rec.mp4").exists()
        assert (await media.end()).event is EventKind.STOPPED


async def test_a_recording_that_takes_too_long_is_told_and_its_id_is_free_when_it_has_ended(
    tmp_path: Path, run_id: str, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed, "RECORDING_ENDS_S", 0.3)
    rec = Mp4Sink(id="rec", path="rec.mp4")
    async with playing(tmp_path, run_id, NullSink()) as (media, stream):
        assert (await change(media, stream, rec)).event is EventKind.APPLIED
        assert "rec did not end within 0.3 s" in (await change(media, stream, remove="rec")).reason
        assert (await change(media, stream, rec)).gone
        gate.opened.set()
        await until(lambda: not media.egress._live[stream].files)
        again = rec.model_copy(update={"path": "again.mp4"})
        assert (await change(media, stream, again)).event is EventKind.APPLIED


ENDING = """
import asyncio, sys, time
from contextlib import suppress
from pathlib import Path
from services.egress.sink_thread import SinkThread
from services.egress.sinks.null import NullSink

class Slow(NullSink):
    def finish(self):
        time.sleep(1.5)
        Path(sys.argv[1]).write_text("whole")
        return "it"

async def main():
    thread = SinkThread("s", {"rec": Slow()}, 8, lambda: None)
    with suppress(TimeoutError):
        await asyncio.wait_for(thread.finish(), 0.1)

asyncio.run(main())
"""


def test_a_process_that_is_told_to_end_completes_its_files_first(tmp_path: Path) -> None:
    made = tmp_path / "made"
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", ENDING, str(made)], cwd=root, check=True, timeout=60)
    assert made.read_text() == "whole"
