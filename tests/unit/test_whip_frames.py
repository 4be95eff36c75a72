"""Packets into frames, arrival into capture times, and the bounded hand-over: with integers and virtual time."""

from __future__ import annotations

from dataclasses import dataclass

from shared.rtc.arrival import ArrivalClock
from shared.rtc.inbox import MAX_FRAMES, EncodedFrame, Inbox, Over
from shared.rtc.jitter import PATIENCE_S, FrameBuffer, ahead, is_key_frame

KEY, DELTA = b"\x00\x00\x00\x01\x65k", b"\x00\x00\x00\x01\x41d"


@dataclass
class Packet:
    sequence_number: int
    timestamp: int
    marker: int
    _data: bytes = DELTA
    payload_type: int = 99


class Wire:
    """A buffer with a clock of its own; ``got`` are the timestamps that came out, ``asked`` how often for a key frame."""

    def __init__(self) -> None:
        self.now = 1_000_000_000_000
        self.buffer = FrameBuffer(lambda _: "H264", lambda: self.now)
        self.got: list[int] = []
        self.asked = 0

    def send(self, *packets: Packet, after_s: float = 0.01) -> None:
        for packet in packets:
            self.now += int(after_s * 1e9)
            ask, frame = self.buffer.add(packet)
            self.asked += ask
            self.got += [f.timestamp for f in ([frame] if frame else []) + self.buffer.ready()]


def frame(first: int, timestamp: int, packets: int = 2, data: bytes = DELTA) -> list[Packet]:
    return [
        Packet((first + i) % 65536, timestamp, int(i == packets - 1), data if i == 0 else b"x") for i in range(packets)
    ]


def test_a_frame_comes_out_with_its_last_packet_and_across_the_wrap() -> None:
    wire = Wire()
    wire.send(*frame(65535, 0, data=KEY))
    assert wire.got == [0]
    wire.send(*frame(1, 3000))
    assert wire.got == [0, 3000]
    assert ahead(1, 65535) == 2
    assert ahead(65535, 1) == -2


def test_reordered_and_repeated_packets_cost_nothing() -> None:
    wire = Wire()
    key, second, third = frame(10, 0, data=KEY), frame(12, 1), frame(14, 2)
    wire.send(*key, second[1], third[0], second[0], second[0], key[0], third[1])
    assert wire.got == [0, 1, 2]
    assert (wire.buffer.gaps, wire.asked) == (0, 1)  # the first frame of all is asked for as a key frame


def test_a_lost_packet_is_waited_for_and_then_passed_up_to_a_key_frame() -> None:
    wire = Wire()
    wire.send(*frame(10, 0, data=KEY), frame(12, 1)[1])
    wire.send(*frame(14, 2))
    assert wire.got == [0], "the lost one may still come"
    wire.send(*frame(16, 3), after_s=PATIENCE_S)
    assert wire.buffer.gaps == 1
    assert wire.got == [0], "what refers to the lost picture is not shown"
    asked = wire.asked
    assert asked >= 1
    wire.send(*frame(18, 4), after_s=0.6)
    assert wire.asked > asked, "the request may be lost, too"
    wire.send(*frame(20, 5, data=KEY), *frame(22, 6))
    assert wire.got == [0, 5, 6]


def test_a_late_packet_within_patience_heals_all() -> None:
    wire = Wire()
    second = frame(12, 1)
    wire.send(*frame(10, 0, data=KEY), second[1], *frame(14, 2), second[0])
    assert wire.got == [0, 1, 2]
    assert wire.buffer.gaps == 0


def test_a_sender_that_begins_anew_is_followed() -> None:
    wire = Wire()
    wire.send(*frame(10, 0, data=KEY), *frame(30_000, 9, data=KEY), *frame(30_002, 10))
    assert wire.got == [0, 9, 10]


def test_without_markers_the_next_frame_ends_the_last() -> None:
    wire = Wire()
    wire.send(Packet(1, 0, 0, KEY), Packet(2, 1, 0), Packet(3, 2, 0))
    assert wire.got == [0, 1]


def test_key_frames_are_known() -> None:
    assert is_key_frame("H264", b"\x00\x00\x01\x67sps\x00\x00\x01\x68pps\x00\x00\x01\x65idr")
    assert not is_key_frame("H264", DELTA)
    assert is_key_frame("VP8", b"\x10")
    assert not is_key_frame("VP8", b"\x11")
    assert not is_key_frame("VP8", b"")


def test_capture_times_are_even_and_never_after_the_arrival() -> None:
    clock, held_up = ArrivalClock(90_000), [0, 40, 5, 60, 0, 3]
    base = 10**18
    found = []
    for n, late_ms in enumerate(held_up):
        arrived = base + n * 33_333_333 + late_ms * 1_000_000
        found.append(clock.captured_ns((2**32 - 6000 + n * 3000) % 2**32, arrived))
        assert found[-1] <= arrived
    steps = [(b - a) / 1e6 for a, b in zip(found, found[1:], strict=False)]
    assert all(32 < step < 35 for step in steps), steps
    cut = base + 20 * 10**9
    assert clock.captured_ns(3000, cut) == cut, "after a cut the clock begins anew"


def encoded(key: bool) -> EncodedFrame:
    return EncodedFrame("s", "H264", b"", 0, key)


def test_a_reader_that_is_behind_gets_the_newest_from_a_key_frame_on() -> None:
    inbox, asked = Inbox(), []
    inbox.ask_key = lambda: asked.append(1)
    for n in range(MAX_FRAMES + 1):
        inbox.put(encoded(n == 0))
    assert asked == [1]
    assert inbox.dropped == MAX_FRAMES + 1
    inbox.put(encoded(False))
    inbox.put(encoded(True))
    item = inbox.get()
    assert isinstance(item, EncodedFrame)
    assert item.key
    inbox.end("over")
    assert inbox.get() == Over("over")
    inbox.put(encoded(True))
    assert inbox.get() == Over("over")
