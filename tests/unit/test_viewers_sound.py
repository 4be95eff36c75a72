"""The sound of who watches by WebRTC, and of pictures that stand still: whatever a source does, the stream goes on."""

from __future__ import annotations

from fractions import Fraction
from typing import Any, cast

import av
import numpy as np
import pytest

from services.egress.audio import AudioOrder
from services.egress.rtc.fanout import Encoded
from services.egress.sinks import whep
from services.egress.sinks.port import OutFrame
from services.egress.sinks.whep import WhepSink
from services.egress.stills import Stills
from shared.contracts.events import AudioCaptured, ChunkStamp, FrameStamp
from shared.media.audio_header import make_encoded_header
from shared.playout import PlayoutDelay

RATE = 48_000
CHANNELS = {"mono": 1, "stereo": 2, "5.1": 6}
MS = 1_000_000


def parts_of(layout: str, seconds: float, begins_s: float = 0.0, seq: int = 0) -> list[AudioCaptured]:
    """A tone as AC-3, eight packets a part."""
    shape = (CHANNELS[layout], 1536)
    header = make_encoded_header("ac3", RATE, layout, 192_000, np.zeros(shape, np.float32))
    encoder: Any = av.CodecContext.create("ac3", "w")
    encoder.sample_rate, encoder.layout, encoder.format, encoder.bit_rate = RATE, layout, "fltp", 192_000
    encoder.time_base = Fraction(1, RATE)
    packets: list[tuple[int, int, int, bytes]] = []
    for index in range(int(seconds * RATE / 1536)):
        at = np.arange(index * 1536, (index + 1) * 1536)
        tone = np.broadcast_to(0.3 * np.sin(at * 2 * np.pi * 440 / RATE), shape).astype(np.float32)
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(tone), format="fltp", layout=layout)
        frame.sample_rate, frame.pts, frame.time_base = RATE, index * 1536, Fraction(1, RATE)
        start = int(begins_s * RATE) + index * 1536
        packets += [(start, start, 1536, bytes(packet)) for packet in encoder.encode(frame)]
    return [
        AudioCaptured(
            stream="s",
            epoch=1,
            seq=seq + place,
            codec="ac3",
            sample_rate=RATE,
            layout=layout,
            time_base=(1, RATE),
            extradata=None,
            packets=tuple(packets[place * 8 : place * 8 + 8]),
            header=header,
        )
        for place in range((len(packets) + 7) // 8)
    ]


class Viewers:
    """In the place of the loop and of its fanout: what viewers are given."""

    def __init__(self) -> None:
        self.sound: list[Encoded] = []

    def takes_key(self, now_ns: int) -> bool:
        return False

    def video(self, packet: Encoded) -> None: ...

    def audio(self, packet: Encoded) -> None:
        self.sound.append(packet)

    def call_soon_threadsafe(self, take: Any, packet: Encoded) -> None:
        take(packet)


@pytest.fixture
def viewers(monkeypatch: pytest.MonkeyPatch) -> Viewers:
    made = Viewers()
    monkeypatch.setattr(whep.asyncio, "get_running_loop", lambda: made)
    return made


def frame_at(seconds: float) -> OutFrame:
    return OutFrame(np.zeros((64, 96, 3), np.uint8), int(seconds * 1000), 40, Fraction(1, 1000))


def play(sink: WhepSink, until_s: float, begin_s: float = 0.0) -> None:
    """Pictures, 25 a second."""
    for index in range(int(begin_s * 25), int(until_s * 25) + 1):
        sink.write(frame_at(index / 25))


def test_a_source_that_changes_its_channels_is_heard_on(viewers: Viewers) -> None:
    sink = WhepSink(96, 64, cast("Any", viewers))
    sink.viewers = 1
    for part in [*parts_of("stereo", 1.0), *parts_of("5.1", 1.0, 1.0, 10), *parts_of("mono", 1.0, 2.0, 20)]:
        sink.audio(part)
    play(sink, 3.2)
    heard = [packet.pts / RATE for packet in viewers.sound]
    assert heard == sorted(heard)
    assert len(heard) > 0.9 * 3.0 / 0.02
    assert all(any(at <= moment < at + 0.1 for moment in heard) for at in np.arange(0.1, 2.8, 0.1))
    sink.finish()


def test_after_a_gap_in_the_sound_it_is_heard_again(viewers: Viewers) -> None:
    sink = WhepSink(96, 64, cast("Any", viewers))
    sink.viewers = 1
    for part in [*parts_of("stereo", 1.0), *parts_of("stereo", 1.0, 5.0, 10)]:
        sink.audio(part)
    play(sink, 6.2)
    assert {round(packet.pts / RATE) for packet in viewers.sound} >= {0, 1, 5, 6}


def test_nothing_is_encoded_while_nobody_watches(viewers: Viewers, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[AudioCaptured] = []
    track_of = whep.track_of
    monkeypatch.setattr(whep, "track_of", lambda part: made.append(part) or track_of(part))
    sink = WhepSink(96, 64, cast("Any", viewers))
    for part in parts_of("stereo", 4.0):
        sink.audio(part)
    play(sink, 2.0)
    assert (made, viewers.sound) == ([], [])
    sink.viewers = 1
    play(sink, 3.0, 2.04)
    assert len(made) == 1
    assert 1.9 < viewers.sound[0].pts / RATE < 2.4, "from where the picture is"
    sink.viewers = 0
    play(sink, 3.5, 3.04)
    count = len(viewers.sound)
    sink.viewers = 1
    play(sink, 4.0, 3.54)
    assert viewers.sound[count].pts / RATE > 3.4
    assert len(made) == 2, "begun anew, without a rest of before"


def test_what_breaks_the_sound_costs_the_picture_nothing(viewers: Viewers, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(part: AudioCaptured) -> None:
        raise RuntimeError("the encoder is gone")

    monkeypatch.setattr(whep, "track_of", broken)
    sink = WhepSink(96, 64, cast("Any", viewers))
    sink.viewers = 1
    for part in parts_of("stereo", 1.0):
        sink.audio(part)
    play(sink, 1.0)
    assert viewers.sound == []


def test_the_sound_of_a_picture_that_stands_still_goes_on(viewers: Viewers) -> None:
    sink = WhepSink(96, 64, cast("Any", viewers))
    sink.viewers = 1
    for part in parts_of("stereo", 3.0):
        sink.audio(part)
    sink.write(frame_at(0.0))
    before = len(viewers.sound)
    sink.still(Fraction(2))
    assert len(viewers.sound) - before > 0.9 * 2.0 / 0.02
    assert max(packet.pts for packet in viewers.sound) <= 2 * RATE


def skipped(number: int, captured_ms: int) -> ChunkStamp:
    frames = tuple(
        FrameStamp(
            index=4 * number + i,
            pts=4 * number + i,
            duration=1,
            captured_ns=(captured_ms + 50 * i) * MS,
            deadline_ns=(captured_ms + 600) * MS,
        )
        for i in range(4)
    )
    return ChunkStamp(stream="s", epoch=1, chunk=number, frames=frames, live=True, time_base=(1, 20))


def test_a_skipped_chunk_is_over_when_its_last_frame_would_have_been_shown() -> None:
    delay, stills = PlayoutDelay(600 * MS), Stills()
    delay.observe(240 * MS)
    stills.add(skipped(3, 1000), delay)
    stills.add(skipped(4, 1200), delay)
    assert stills.next_at == (1150 + 250) * MS
    assert stills.due(1399 * MS) is None
    assert stills.due(1400 * MS) == Fraction(16, 20)
    assert stills.due(1401 * MS) is None, "told once"
    assert stills.due(1600 * MS) == Fraction(20, 20)
    assert stills.next_at is None
    stills.add(skipped(5, 1400).model_copy(update={"live": False}), delay)
    assert stills.next_at is None


def test_an_egress_that_comes_back_begins_with_the_part_that_comes() -> None:
    parts = [part.model_copy(update={"seq": 5000 + part.seq}) for part in parts_of("mono", 2.0)]
    order = AudioOrder(resumed=True)
    assert order.push(parts[0]) == [parts[0]]
    assert order.push(parts[2]) == []
    assert order.push(parts[1]) == [parts[1], parts[2]]
    assert (order.lost, order.next) == (0, 5003)
    assert order.complete(5003)
