"""AMF0, the values in RTMP's commands: as much as publishers send, and what they are answered."""

from __future__ import annotations

import struct
from typing import Any

DEEPEST = 8


def encode(*values: Any) -> bytes:
    """Strings, numbers, None and dicts of them."""
    out = bytearray()
    for value in values:
        if value is None:
            out += b"\x05"
        elif isinstance(value, str):
            out += b"\x02" + _text(value)
        elif isinstance(value, dict):
            out += b"\x03"
            for name, each in value.items():
                out += _text(name) + encode(each)
            out += b"\x00\x00\x09"
        else:
            out += b"\x00" + struct.pack(">d", value)
    return bytes(out)


def decode(data: bytes) -> list[Any]:
    """The values up to the end, or to the first that cannot be read."""
    reader, values = _Reader(data), list[Any]()
    try:
        while not reader.at_end:
            values.append(reader.value(DEEPEST))
    except (struct.error, ValueError):
        pass
    return values


def _text(value: str) -> bytes:
    raw = value.encode()
    return struct.pack(">H", len(raw)) + raw


class _Reader:
    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    @property
    def at_end(self) -> bool:
        return self._at >= len(self._data)

    def value(self, deep: int) -> Any:
        """Raises struct.error and ValueError."""
        kind = self._unpack(">B")
        if kind == 0x00:
            return self._unpack(">d")
        if kind == 0x01:
            return bool(self._unpack(">B"))
        if kind in (0x02, 0x0C):
            return self._string(">H" if kind == 0x02 else ">I")
        if kind in (0x05, 0x06):
            return None
        if kind == 0x0B:
            return struct.unpack(">d", self._take(10)[:8])[0]
        if deep and kind in (0x03, 0x08):
            if kind == 0x08:
                self._take(4)
            return self._members(deep - 1)
        if deep and kind == 0x0A:
            return [self.value(deep - 1) for _ in range(self._unpack(">I"))]
        raise ValueError(f"no value of kind {kind} is known here")

    def _members(self, deep: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        while (name := self._string(">H")) or self._data[self._at : self._at + 1] != b"\x09":
            found[name] = self.value(deep)
        self._take(1)
        return found

    def _string(self, length: str) -> str:
        return self._take(self._unpack(length)).decode("utf-8", "replace")

    def _unpack(self, form: str) -> Any:
        return struct.unpack(form, self._take(struct.calcsize(form)))[0]

    def _take(self, size: int) -> bytes:
        taken = self._data[self._at : self._at + size]
        if len(taken) < size:
            raise ValueError("a value is cut off")
        self._at += size
        return taken
