"""How sinks end: a recording takes its time, and neither the other sinks nor the event loop wait for it."""

from __future__ import annotations

import asyncio
import threading
from fractions import Fraction

import av.error
import numpy as np
import pytest

from services.egress.live import feed as feeds
from services.egress.live import h264
from services.egress.live.desk import has_ended
from services.egress.live.feed import Feed
from services.egress.live.h264 import SharedEncoder
from services.egress.sink_thread import SinkThread
from services.egress.sinks.port import OutFrame
from tests.unit.test_live_feed import Output, frame, wait


class Recording:
    """A sink whose end waits for a gate."""

    def __init__(self) -> None:
        self.shown: list[int] = []
        self.gate = threading.Event()

    def expect_audio(self, expected: bool) -> None: ...

    def write(self, frame: OutFrame) -> None:
        self.shown.append(frame.pts)

    def audio(self, part: object) -> None: ...

    def still(self, until_s: Fraction) -> None: ...

    def finish(self) -> str:
        assert self.gate.wait(5)
        return f"{len(self.shown)} frames"


def picture(pts: int) -> OutFrame:
    return OutFrame(np.zeros((16, 16, 3), np.uint8), pts, 1, Fraction(1, 10))


async def test_the_other_sinks_go_on_while_one_that_was_removed_is_completed() -> None:
    recording, other = Recording(), Recording()
    other.gate.set()
    thread = SinkThread("s", {"mp4": recording, "other": other}, 16, lambda: None)
    thread.put(picture(0))
    made = thread.remove("mp4")
    assert made is not None
    for pts in range(1, 9):
        thread.put(picture(pts))
    await asyncio.to_thread(wait, lambda: len(other.shown) == 9)
    assert recording.shown == [0]
    assert not made.done()
    end = asyncio.ensure_future(thread.finish())
    await asyncio.sleep(0.05)
    assert not end.done(), "the stream has not ended before its files are there"
    recording.gate.set()
    assert await made == "1 frames"
    assert sorted(await end) == ["1 frames", "9 frames"]
    assert await thread.finish() == await end, "told to whoever asks"


async def test_no_thread_of_the_pool_waits_for_sinks() -> None:
    """A few slow recordings would keep every other stream from being opened."""
    sinks = [Recording() for _ in range(40)]
    threads = [SinkThread(f"s{n}", {"mp4": sink}, 16, lambda: None) for n, sink in enumerate(sinks)]
    ends = [asyncio.ensure_future(thread.finish()) for thread in threads]
    await asyncio.sleep(0.05)
    assert await asyncio.wait_for(asyncio.to_thread(lambda: "free"), 1.0) == "free"
    for sink in sinks:
        sink.gate.set()
    await asyncio.gather(*ends)


class Slow(Output):
    """Its end waits for the gate."""

    def close(self) -> str:
        self.gate.wait(5)
        return super().close()


@pytest.mark.parametrize(("kind", "ended"), [("rtmp", False), ("mp4", True)])
async def test_a_recording_is_given_more_time_to_end(kind: str, ended: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feeds, "ENDS_S", 0.05)
    output = Slow()
    feed = Feed("s", lambda: output, SharedEncoder(16, 16, Fraction(10)), lambda _: None, kind)
    feed.put_video(frame(0, key=True))
    await asyncio.to_thread(wait, lambda: output.written == [0])
    output.gate.clear()
    feed.end()
    asyncio.get_running_loop().call_later(0.3, output.gate.set)
    assert await has_ended(feed) is ended
    assert await asyncio.to_thread(feed.join, 5)
    assert await has_ended(feed), "it is known afterwards, too"


def test_hardware_is_taken_only_if_it_does_what_it_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def pretended(name: str) -> bool:
        if name == "absent":
            raise av.error.ExternalError(1, "no such device")
        return name == "good"

    monkeypatch.setattr(h264, "obeys", pretended)
    for names, chosen in ((("absent", "deaf", "good"), "good"), (("absent", "deaf"), h264.SOFTWARE)):
        monkeypatch.setattr(h264, "HARDWARE", names)
        h264.best_encoder.cache_clear()
        assert h264.best_encoder() == chosen
    h264.best_encoder.cache_clear()


def test_what_obeys_gives_a_keyframe_where_one_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert h264.obeys(h264.SOFTWARE)
    monkeypatch.setitem(h264.OPTIONS, h264.SOFTWARE, {"x264-params": "keyint=1"})
    assert not h264.obeys(h264.SOFTWARE), "every frame is one"


def test_the_encoder_is_chosen_by_who_encodes() -> None:
    asked: list[str] = []

    def choose() -> str:
        asked.append(threading.current_thread().name)
        return h264.SOFTWARE

    encoder = SharedEncoder(16, 16, Fraction(10), choose)
    assert asked == []
    thread = threading.Thread(target=encoder.encode, args=(picture(0), True), name="sinks")
    thread.start()
    thread.join()
    assert asked == ["sinks"]
