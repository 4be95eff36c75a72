"""RTMP's chunks and AMF0: whole messages come out of whatever pieces they come in, and nonsense ends it."""

from __future__ import annotations

import io
import struct

import pytest

from shared.media.rtmp import amf
from shared.media.rtmp.messages import ACKNOWLEDGED, Kind, LeftError, Message, Messages, RtmpError


def head(form: int, channel: int, *numbers: int) -> bytes:
    """A chunk's header: time, length and kind, as far as this form has them."""
    out = bytes([form << 6 | channel])
    for number, size in zip(numbers, (3, 3, 1), strict=False):
        out += number.to_bytes(size, "big")
    return out + (bytes(4) if form == 0 else b"")


def read_all(data: bytes, largest: int = 1 << 20, sent: bytearray | None = None) -> list[Message]:
    kept = sent if sent is not None else bytearray()
    messages, found = Messages(io.BufferedReader(io.BytesIO(data)), kept.extend, largest), list[Message]()  # type: ignore
    try:
        while True:
            found.append(messages.read())
    except LeftError:
        return found


def test_what_is_written_is_read() -> None:
    out = bytearray()
    messages = Messages(io.BufferedReader(io.BytesIO()), out.extend, 0)  # type: ignore[arg-type]
    for size in (0, 1, 127, 128, 129, 1000):
        messages.write(Kind.COMMAND, bytes(range(256)) * 4 if size == 1000 else b"x" * size)
    assert [len(message.body) for message in read_all(bytes(out))] == [0, 1, 127, 128, 129, 1024]
    assert read_all(bytes(out))[-1] == Message(Kind.COMMAND, 0, bytes(range(256)) * 4)


def test_pieces_of_two_messages_come_in_turn() -> None:
    first, second = b"a" * 200, b"b" * 300
    data = head(0, 4, 1000, 200, Kind.SOUND) + first[:128]
    data += head(0, 6, 1010, 300, Kind.PICTURE) + second[:128] + head(3, 4) + first[128:]
    data += head(3, 6) + second[128:256] + head(3, 6) + second[256:]
    data += head(1, 4, 20, 3, Kind.SOUND) + b"ccc" + head(2, 4, 30) + b"ddd" + head(3, 4) + b"eee"
    found = [(message.kind, message.at_ms, message.body) for message in read_all(data)]
    assert found[:2] == [(Kind.SOUND, 1000, first), (Kind.PICTURE, 1010, second)]
    assert found[2:] == [(Kind.SOUND, 1020, b"ccc"), (Kind.SOUND, 1050, b"ddd"), (Kind.SOUND, 1080, b"eee")]


def test_hours_of_milliseconds_other_chunk_sizes_and_far_channels() -> None:
    late = 0x01020304
    data = head(0, 2, 0, 4, Kind.CHUNK_SIZE) + struct.pack(">I", 4096) + head(0, 4, 0xFFFFFF, 5000, Kind.PICTURE)
    data += struct.pack(">I", late) + b"v" * 4096 + head(3, 4) + struct.pack(">I", late) + b"v" * 904
    data += bytes([0, 10]) + head(0, 0, 7, 1, Kind.SOUND)[1:] + b"s" + bytes([1, 1, 1]) + head(0, 0, 8, 1, 9)[1:] + b"t"
    found = read_all(data)
    assert [(m.at_ms, len(m.body)) for m in found] == [(late, 5000), (7, 1), (8, 1)]


def test_a_message_may_be_given_up_pinged_and_acknowledged() -> None:
    data = head(0, 4, 0, 200, Kind.PICTURE) + b"x" * 128 + head(0, 2, 0, 4, Kind.ABORT) + struct.pack(">I", 4)
    data += head(0, 2, 0, 6, Kind.CONTROL) + b"\x00\x06ABCD" + head(0, 4, 5, 2, Kind.PICTURE) + b"ok"
    sent = bytearray()
    assert read_all(data, sent=sent) == [Message(Kind.PICTURE, 5, b"ok")]
    assert sent.endswith(b"\x00\x07ABCD")
    sent.clear()
    large = (head(0, 4, 0, 128, Kind.PICTURE) + b"x" * 128) * (ACKNOWLEDGED // 128)
    assert len(read_all(large, sent=sent)) == ACKNOWLEDGED // 128
    assert sent[7] == Kind.ACKNOWLEDGE
    assert ACKNOWLEDGED <= int.from_bytes(sent[12:16], "big") < ACKNOWLEDGED + 256


@pytest.mark.parametrize(
    "data",
    [
        head(0, 4, 0, 0xFFFFFF, Kind.PICTURE),
        b"".join(bytes([0, number]) + head(0, 0, 0, 200, 9)[1:] + bytes(128) for number in range(100)),
    ],
)
def test_nonsense_is_not_read_on(data: bytes) -> None:
    with pytest.raises(RtmpError, match=r"message of|channels"):
        read_all(data)


def test_what_waits_is_bounded() -> None:
    size = 8 << 20
    begin = b"".join(head(0, channel, 0, size, Kind.PICTURE) + bytes(128) for channel in (4, 5, 6))
    grown = head(0, 2, 0, 4, Kind.CHUNK_SIZE) + struct.pack(">I", size - 129)
    data = begin + grown + b"".join(head(3, channel) + bytes(size - 129) for channel in (4, 5, 6))
    with pytest.raises(RtmpError, match="under way"):
        read_all(data, largest=size)


def test_values_are_read_as_far_as_they_can_be() -> None:
    values = ["connect", 1, {"app": "live", "tcUrl": "rtmp://h/live", "n": 2.5, "of": {"a": None}}, None]
    assert amf.decode(amf.encode(*values)) == values
    array = b"\x0a\x00\x00\x00\x02" + amf.encode("avc1", 7)
    assert amf.decode(b"\x08\x00\x00\x00\x01\x00\x01a" + array + b"\x00\x00\x09") == [{"a": ["avc1", 7]}]
    assert amf.decode(b"\x01\x01\x06\x0b" + bytes(10) + b"\x0c\x00\x00\x00\x01x") == [True, None, 0.0, "x"]
    whole = amf.encode("publish", 1, {"a": 1})
    for end in range(len(whole)):
        assert amf.decode(whole[:end]) == ["publish", 1][: (end >= 10) + (end >= 19)]
    assert amf.decode(b"\x0a\xff\xff\xff\xff" * 1000) == []
    assert amf.decode(b"\x03\x00\x01a" * 1000) == []
