"""Packets into frames without waiting longer than it pays. Pure: packets are duck-typed, time is passed in.

The library's own buffer gives a frame out when the next one begins (a frame of delay), and waits for a lost packet until 512
newer ones have come: seconds, at a low rate. This one gives a frame out with its last packet, passes a gap after
``patience_s``, and gives nothing that refers to a lost picture: after a gap the next frame is a key frame.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

CAPACITY = 2048  # packets: a second of 20 Mbit/s
PATIENCE_S = 0.2  # for a packet that was asked for again: a few round trips
ASK_EVERY_S = 0.5  # how often a key frame is asked for, at most
_HALF = 1 << 15


def ahead(one: int, other: int) -> int:
    """How far sequence number ``one`` is ahead of ``other``: −32768…32767."""
    return (one - other + _HALF) % (1 << 16) - _HALF


def is_key_frame(codec: str, data: bytes) -> bool:
    """Whether a depayloaded frame can be decoded without any other."""
    if codec == "VP8":
        return bool(data) and not data[0] & 1
    kinds = [data[at + 3] & 0x1F for at in _starts(data) if at + 3 < len(data)]
    return 5 in kinds


def _starts(data: bytes) -> list[int]:
    found: list[int] = []
    at = data.find(b"\x00\x00\x01")
    while at >= 0:
        found.append(at)
        at = data.find(b"\x00\x00\x01", at + 3)
    return found


@dataclass(slots=True)
class Frame:
    """One encoded frame. ``timestamp`` is RTP's; ``arrived_ns`` when its first packet came."""

    data: bytes
    timestamp: int
    arrived_ns: int
    key: bool = False
    codec: str = ""


class FrameBuffer:
    """One video track's packets. :meth:`add` returns (ask for a key frame?, a complete frame or None).

    ``codec_of`` names the codec of a payload type. One packet may complete several frames: the rest comes by :meth:`ready`.
    """

    def __init__(self, codec_of: Callable[[int], str], now_ns: Callable[[], int]) -> None:
        self._codec_of, self._now_ns = codec_of, now_ns
        self._packets: dict[int, tuple[Any, int]] = {}
        self._next: int | None = None  # the sequence number that the next frame begins with
        self._blocked_ns: int | None = None
        self._asked_ns = 0
        self._ready: list[Frame] = []
        self.needs_key = True
        self.gaps = 0  # passed without the packet that was missing
        self.withheld = 0  # frames that referred to a lost picture

    def add(self, packet: Any) -> tuple[bool, Frame | None]:
        """A packet came, in any order, perhaps again."""
        now = self._now_ns()
        number: int = packet.sequence_number
        if self._next is None:
            self._next = number
        offset = ahead(number, self._next or 0)
        if abs(offset) >= CAPACITY:  # the sender began anew
            self._restart(number)
        elif offset < 0:
            return self._ask(now), None
        self._packets[number] = (packet, now)
        self._collect()
        if self._packets and self._blocked_ns is None:
            self._blocked_ns = self._oldest_ns()
        elif not self._packets:
            self._blocked_ns = None
        if self._packets and self._is_hole() and now - (self._blocked_ns or now) > PATIENCE_S * 1e9:
            self._pass_gap()
            self._collect()
        return self._ask(now), self._ready.pop(0) if self._ready else None

    def ready(self) -> list[Frame]:
        """Further frames that the last packet completed."""
        ready, self._ready = self._ready, []
        return ready

    def lost_picture(self) -> None:
        """A frame that was given out was thrown away, or did not decode: what follows refers to it."""
        self.needs_key = True

    def _is_hole(self) -> bool:
        return self._next is not None and (self._next not in self._packets or self._end_of_frame() is None)

    def _oldest_ns(self) -> int:
        return min(came for _, came in self._packets.values())

    def _end_of_frame(self) -> int | None:
        """The last sequence number of the frame at the front, if all of it is here."""
        assert self._next is not None
        number, first = self._next, self._packets.get(self._next)
        while (here := self._packets.get(number)) is not None and first is not None:
            if here[0].timestamp != first[0].timestamp:
                return (number - 1) % (1 << 16)  # a sender that sets no marker
            if here[0].marker:
                return number
            number = (number + 1) % (1 << 16)
        return None

    def _collect(self) -> None:
        while self._next is not None and (end := self._end_of_frame()) is not None:
            count = ahead(end, self._next) + 1
            taken = [self._packets.pop((self._next + i) % (1 << 16)) for i in range(count)]
            self._next = (end + 1) % (1 << 16)
            self._blocked_ns = self._oldest_ns() if self._packets else None
            data = b"".join(packet._data for packet, _ in taken)
            if not data:
                continue  # padding
            codec = self._codec_of(taken[0][0].payload_type)
            frame = Frame(data, taken[0][0].timestamp, min(came for _, came in taken), is_key_frame(codec, data), codec)
            if self.needs_key and not frame.key:
                self.withheld += 1
                continue
            self.needs_key = False
            self._ready.append(frame)

    def _pass_gap(self) -> None:
        """Give up what is missing at the front: go on with the first frame of which the beginning is here."""
        assert self._next is not None
        self.gaps += 1
        self.needs_key = True
        front = self._next
        numbers = sorted(self._packets, key=lambda number: ahead(number, front))
        stuck = self._packets[numbers[0]][0].timestamp
        for last, number in zip([None, *numbers], numbers, strict=False):
            follows = last is not None and ahead(number, last) == 1
            new = self._packets[number][0].timestamp != stuck
            if new and follows:
                self._drop_before(number)
                return
            if new:
                stuck = self._packets[number][0].timestamp
        self._drop_before((numbers[-1] + 1) % (1 << 16))

    def _drop_before(self, number: int) -> None:
        self._packets = {n: kept for n, kept in self._packets.items() if ahead(n, number) >= 0}
        self._next = number
        self._blocked_ns = self._oldest_ns() if self._packets else None

    def _restart(self, number: int) -> None:
        self._packets.clear()
        self._next, self._blocked_ns = number, None
        self.gaps += 1
        self.needs_key = True

    def _ask(self, now: int) -> bool:
        if not self.needs_key or now - self._asked_ns < ASK_EVERY_S * 1e9:
            return False
        self._asked_ns = now
        return True
