"""RTMP's chunks: messages are cut into pieces, and those of several are sent in turn."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Protocol

HANDSHAKE = 1536
MOST_CHANNELS = 64
MOST_WAITING = 16 << 20  # bytes of messages that are not complete
EXTENDED = 0xFFFFFF
FIRST_CHUNK = 128  # bytes of a piece, before anything else was agreed
ACKNOWLEDGED = 1 << 20


class RtmpError(OSError):
    """A peer who is not spoken to any longer. The message is one line."""


class LeftError(RtmpError):
    """A peer who hung up."""


class Readable(Protocol):
    """What messages are read from."""

    def read(self, size: int, /) -> bytes:
        """So many bytes, fewer at the end only. Raises OSError."""
        ...


class Kind(IntEnum):
    """What a message is."""

    CHUNK_SIZE = 1
    ABORT = 2
    ACKNOWLEDGE = 3
    CONTROL = 4
    WINDOW = 5
    BANDWIDTH = 6
    SOUND = 8
    PICTURE = 9
    COMMAND_3 = 17
    DATA = 18
    COMMAND = 20


@dataclass(frozen=True, slots=True)
class Message:
    """One message, complete. ``at_ms`` is its timestamp."""

    kind: int
    at_ms: int
    body: bytes


@dataclass(slots=True)
class _Channel:
    kind: int = 0
    length: int = 0
    at_ms: int = 0
    stamp: int = 0  # as the last header has it: a time, or the time since the message before
    extended: bool = False
    begun: bool = False
    body: bytearray = field(default_factory=bytearray)


class Messages:
    """Reads whole messages from ``stream`` and writes by ``send``. Both raise OSError; RtmpError is for nonsense.

    ``largest`` bounds a message; raise it for one who may send pictures.
    """

    def __init__(self, stream: Readable, send: Callable[[bytes], None], largest: int) -> None:
        self.largest = largest
        self._stream, self._send = stream, send
        self._channels: dict[int, _Channel] = {}
        self._chunk = self._own_chunk = FIRST_CHUNK
        self._waiting = self._came = self._told = 0

    def exactly(self, size: int) -> bytes:
        """So many bytes. Raises LeftError when there are no more."""
        data = self._stream.read(size)
        if len(data) < size:
            raise LeftError("it has ended")
        self._came += size
        return data

    def write(self, kind: int, body: bytes, *, channel: int = 3, stream: int = 0, at_ms: int = 0) -> None:
        """A message of ours, in pieces as small as they are before :meth:`cut_larger`."""
        size, more = self._own_chunk, bytes([0xC0 | channel])
        stamp = min(at_ms, EXTENDED)
        header = struct.pack(">BBHBHB", channel, stamp >> 16, stamp & 0xFFFF, len(body) >> 16, len(body) & 0xFFFF, kind)
        header += struct.pack("<I", stream)
        if stamp == EXTENDED:  # before every piece
            header, more = header + struct.pack(">I", at_ms), more + struct.pack(">I", at_ms)
        self._send(header + more.join(body[start : start + size] for start in range(0, len(body), size)))

    def cut_larger(self, chunk: int) -> None:
        """Have our messages come in pieces of so many bytes from now on."""
        self.write(Kind.CHUNK_SIZE, struct.pack(">I", chunk), channel=2)
        self._own_chunk = chunk

    def read(self) -> Message:
        """The next one that is not about the transport itself."""
        while (message := self.advance()) is None:
            pass
        return message

    def advance(self) -> Message | None:
        """One piece; the message that it was the last of, if that is not about the transport itself."""
        message = self._piece()
        if self._came - self._told >= ACKNOWLEDGED:
            self._told = self._came
            self.write(Kind.ACKNOWLEDGE, struct.pack(">I", self._came & 0xFFFFFFFF), channel=2)
        return None if message is None or self._is_transport(message) else message

    def _is_transport(self, message: Message) -> bool:
        body = message.body
        if message.kind == Kind.CHUNK_SIZE and len(body) >= 4:
            self._chunk = max(1, int.from_bytes(body[:4], "big") & 0x7FFFFFFF)
        elif message.kind == Kind.ABORT and len(body) >= 4:
            self._forget(self._channels.get(int.from_bytes(body[:4], "big")))
        elif message.kind == Kind.CONTROL and body[:2] == b"\x00\x06":
            self.write(Kind.CONTROL, b"\x00\x07" + body[2:6], channel=2)
        return message.kind <= Kind.BANDWIDTH

    def _forget(self, channel: _Channel | None) -> None:
        if channel is not None:
            self._waiting -= len(channel.body)
            channel.body.clear()
            channel.begun = False

    def _piece(self) -> Message | None:
        """One chunk; the message when it was its last."""
        form, channel = self._header()
        if form < 3 or not channel.begun:
            self._begin(form, channel)
        elif channel.extended:
            self.exactly(4)
        size = min(self._chunk, channel.length - len(channel.body))
        self._waiting += size
        if self._waiting > MOST_WAITING:
            raise RtmpError("too much of too many messages is under way")
        channel.body += self.exactly(size)
        if len(channel.body) < channel.length:
            return None
        message = Message(channel.kind, channel.at_ms, bytes(channel.body))
        self._forget(channel)
        return message

    def _header(self) -> tuple[int, _Channel]:
        first = self.exactly(1)[0]
        form, number = first >> 6, first & 63
        if number == 0:
            number = 64 + self.exactly(1)[0]
        elif number == 1:
            number = 64 + int.from_bytes(self.exactly(2), "little")
        channel = self._channels.get(number)
        if channel is None:
            if len(self._channels) >= MOST_CHANNELS:
                raise RtmpError(f"more than {MOST_CHANNELS} channels")
            channel = self._channels[number] = _Channel()
        return form, channel

    def _begin(self, form: int, channel: _Channel) -> None:
        self._forget(channel)
        if form < 3:
            channel.stamp = int.from_bytes(self.exactly(3), "big")
            channel.extended = channel.stamp == EXTENDED
        if form < 2:
            channel.length, channel.kind = int.from_bytes(self.exactly(3), "big"), self.exactly(1)[0]
        if form == 0:
            self.exactly(4)
        if channel.extended:
            channel.stamp = int.from_bytes(self.exactly(4), "big")
        if channel.length > self.largest:
            raise RtmpError(f"a message of {channel.length} bytes")
        channel.at_ms = (channel.stamp if form == 0 else channel.at_ms + channel.stamp) & 0xFFFFFFFF
        channel.begun = True
