"""One live sink's queue: what it drops, what it does when its output breaks."""

from __future__ import annotations

import threading
import time
from fractions import Fraction

import pytest

from services.egress.live.feed import FIRST_RETRY_S, MAX_FRAMES, Feed, News, Told
from services.egress.live.h264 import EncodedFrame, SharedEncoder
from services.egress.sinks.port import SinkError
from shared.contracts.events import AudioCaptured
from shared.contracts.sinks import SinkState


class Output:
    """A muxer that writes into a list, and breaks or blocks when it is told to."""

    def __init__(self, again: bool = True) -> None:
        self.again = again
        self.opened = 0
        self.written: list[int] = []
        self.broken = False
        self.gate = threading.Event()
        self.gate.set()

    def open(self, encoder: SharedEncoder, header: bytes) -> None:
        self.opened += 1
        if self.broken:
            raise SinkError("the server is away")

    def video(self, frame: EncodedFrame) -> None:
        self.gate.wait(5)
        if self.broken:
            raise SinkError("the line is cut")
        self.written.append(frame.pts)

    def audio(self, part: AudioCaptured) -> None: ...

    def close(self) -> str:
        return f"{len(self.written)} frames"


def frame(number: int, key: bool = False) -> EncodedFrame:
    return EncodedFrame(b"x" * 10, number, number, 1, Fraction(1, 10), key, number // 4)


def wait(condition: object, seconds: float = 5.0) -> None:
    until = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < until
        time.sleep(0.002)


@pytest.fixture
def told() -> list[Told]:
    return []


def feed_of(output: Output, told: list[Told]) -> Feed:
    return Feed("s", lambda: output, SharedEncoder(16, 16, Fraction(10)), told.append, "rtmp")


def test_it_begins_with_a_keyframe_and_says_with_which_chunk(told: list[Told]) -> None:
    output = Output()
    feed = feed_of(output, told)
    assert feed.wants_key
    for number in range(6):
        feed.put_video(frame(number))
    for number in range(6, 12):
        feed.put_video(frame(number, key=number == 8))
    feed.end()
    assert feed.join(5)
    assert output.written == [8, 9, 10, 11]
    assert told == [Told("s", News.LIVE, chunk=2)]
    assert (feed.state, feed.made) == (SinkState.CLOSED, "4 frames")
    assert feed.counters["dropped_frames"] == 0  # before it began nothing was its


def test_a_slow_output_loses_whole_pictures_up_to_a_keyframe(told: list[Told]) -> None:
    output = Output()
    feed = feed_of(output, told)
    output.gate.clear()
    for number in range(MAX_FRAMES + 20):
        feed.put_video(frame(number, key=number == 0))
    assert not feed.wants_key  # there is no room for one yet
    assert feed.figures().slow
    assert feed.figures().dropped >= 19
    assert [each.news for each in told] == [News.SLOW], "told once, however long it lasts"
    assert "192 pictures wait" in told[0].reason
    output.gate.set()
    wait(lambda: len(output.written) > MAX_FRAMES // 2)
    wait(lambda: feed.wants_key)
    feed.put_video(frame(1000))
    feed.put_video(frame(1001, key=True))
    feed.put_video(frame(1002))
    feed.end()
    assert feed.join(5)
    assert output.written[-2:] == [1001, 1002]
    assert output.written[:MAX_FRAMES] == list(range(MAX_FRAMES))
    assert feed.counters["dropped_frames"] >= 20
    figures = feed.figures()
    assert (figures.id, figures.sink_kind, figures.state, figures.slow) == ("s", "rtmp", SinkState.CLOSED, False)
    assert (figures.frames, figures.bytes) == (len(output.written), 10 * len(output.written))


def test_the_next_spell_of_slowness_is_told_again(told: list[Told]) -> None:
    output = Output()
    feed = feed_of(output, told)
    for spell in range(2):
        feed.put_video(frame(1000 * spell, key=True))
        wait(lambda: feed.state is SinkState.LIVE and not feed.figures().slow)
        output.gate.clear()
        for number in range(MAX_FRAMES + 5):
            feed.put_video(frame(1000 * spell + 1 + number))
        output.gate.set()
        wait(lambda: feed.wants_key and not feed.figures().slow)
    feed.end()
    assert feed.join(5)
    assert [each.news for each in told] == [News.LIVE, News.SLOW, News.SLOW]


def test_what_breaks_is_told_once_and_opened_again(told: list[Told]) -> None:
    output = Output()
    feed = feed_of(output, told)
    feed.put_video(frame(0, key=True))
    wait(lambda: told == [Told("s", News.LIVE, chunk=0)])
    output.broken = True
    feed.put_video(frame(1))
    wait(lambda: feed.state is SinkState.BROKEN)
    output.broken = False
    wait(lambda: feed.wants_key, FIRST_RETRY_S + 5)
    feed.put_video(frame(8, key=True))
    wait(lambda: feed.state is SinkState.LIVE)
    feed.end()
    assert feed.join(5)
    assert told == [
        Told("s", News.LIVE, chunk=0),
        Told("s", News.BROKEN, "the line is cut"),
        Told("s", News.LIVE, chunk=2),
    ]
    assert (feed.figures().breaks, feed.figures().error) == (1, "the line is cut")
    assert (output.opened, output.written) == (2, [0, 8])


def test_what_will_not_mend_is_left(told: list[Told]) -> None:
    output = Output(again=False)
    output.broken = True
    feed = feed_of(output, told)
    feed.put_video(frame(0, key=True))
    assert feed.join(5)
    assert told == [Told("s", News.GONE, "the server is away")]
    assert feed.state is SinkState.CLOSED
