"""The one who pushes by RTMP: let in by application and key, then read as an FLV file.

FFmpeg's own server only warns of another key, and listens no more once somebody is there.
"""

from __future__ import annotations

import hmac
import secrets
import socket
import struct
import time
from collections.abc import Callable
from typing import Any

from services.ingest.sources.fetch import Patience, patient_reads
from shared.media.rtmp import amf
from shared.media.rtmp.messages import HANDSHAKE, Kind, LeftError, Message, Messages, RtmpError

APP = "live"
LET_IN_S = 4.0  # by then a publisher has said who they are
LARGEST_BEFORE, LARGEST = 64 << 10, 8 << 20
SET_DATA = amf.encode("@setDataFrame")
STREAM = 1  # the number of the one stream on a connection
ENDS = ("FCUnpublish", "deleteStream", "closeStream")


class Publisher:
    """A connection that was accepted, as a file to read. Everything raises OSError; the connection is closed then.

    Nothing is waited for longer than ``silent_s``, nor once ``stopped``.
    """

    def __init__(self, sock: socket.socket, key: str, silent_s: float, stopped: Callable[[], bool]) -> None:
        self._sock, self._key = sock, key
        self.patience = Patience(silent_s, stopped)
        self._stream = patient_reads(sock, self.patience)
        self._messages = Messages(self._stream, self._send, LARGEST_BEFORE)
        self._ready = bytearray()
        self._ended = self._described = False
        try:
            self.patience.until = time.monotonic() + LET_IN_S
            self._shake_hands()
            self._let_in()
            self.patience.until = None
        except BaseException:
            self.close()
            raise
        self._messages.largest = LARGEST

    def read(self, size: int) -> bytes:
        """Up to ``size`` bytes; none at the end, and none after an error."""
        while not self._ready and not self._ended:
            try:
                self._take(self._messages.read())
            except OSError as error:
                self._ended = True
                if not isinstance(error, LeftError):
                    raise
        taken = bytes(self._ready[:size])
        del self._ready[:size]
        return taken

    def close(self) -> None:
        """Hang up."""
        self._stream.close()
        self._sock.close()

    def _send(self, data: bytes) -> None:
        self._sock.settimeout(self.patience.left())
        self._sock.sendall(data)

    def _shake_hands(self) -> None:
        if self._messages.exactly(1) != b"\x03":
            raise RtmpError("this is no RTMP")
        theirs = self._messages.exactly(HANDSHAKE)
        self._send(b"\x03" + bytes(8) + secrets.token_bytes(HANDSHAKE - 8) + theirs)
        self._messages.exactly(HANDSHAKE)

    def _let_in(self) -> None:
        """Until they publish. Raises RtmpError for another application or key, and for one who wants to watch."""
        connected = False
        while True:
            name, number, *more = self._command(self._messages.read()) or ("", 0)
            if name == "connect":
                self._connect(number, more[0] if more and isinstance(more[0], dict) else {})
                connected = True
            elif name in ("releaseStream", "FCPublish"):
                self._answer("_result", number, None)
            elif name == "createStream":
                self._answer("_result", number, None, STREAM)
            elif name == "publish" and connected:
                key = str(more[1]) if len(more) > 1 else ""
                if not hmac.compare_digest(key.encode(), self._key.encode()):
                    self._status("error", "NetStream.Publish.BadName", "this key is not expected here")
                    raise RtmpError("a publisher with another key was turned away")
                self._messages.write(Kind.CONTROL, struct.pack(">HI", 0, STREAM), channel=2)
                self._status("status", "NetStream.Publish.Start", "it is published")
                return
            elif name in ("publish", "play"):
                raise RtmpError("one who does not publish was turned away")

    def _connect(self, number: float, told: dict[str, object]) -> None:
        if str(told.get("app", "")).strip("/") != APP:
            self._answer("_error", number, None, {"level": "error", "code": "NetConnection.Connect.Rejected"})
            raise RtmpError("a publisher of another application was turned away")
        self._messages.write(Kind.WINDOW, struct.pack(">I", 5_000_000), channel=2)
        self._messages.write(Kind.BANDWIDTH, struct.pack(">IB", 5_000_000, 2), channel=2)
        success = {"level": "status", "code": "NetConnection.Connect.Success", "description": "", "objectEncoding": 0}
        self._answer("_result", number, {"fmsVer": "FMS/3,0,1,123", "capabilities": 31}, success)

    def _answer(self, *values: object) -> None:
        self._messages.write(Kind.COMMAND, amf.encode(*values))

    def _status(self, level: str, code: str, description: str) -> None:
        told = {"level": level, "code": code, "description": description}
        self._messages.write(Kind.COMMAND, amf.encode("onStatus", 0, None, told), channel=5, stream=STREAM)

    def _command(self, message: Message) -> tuple[Any, ...] | None:
        """Name, number and arguments, if it is a command."""
        if message.kind not in (Kind.COMMAND, Kind.COMMAND_3):
            return None
        values = amf.decode(message.body[message.kind == Kind.COMMAND_3 :])
        return tuple(values) if len(values) > 1 and isinstance(values[1], float) else None

    def _take(self, message: Message) -> None:
        if (command := self._command(message)) is not None:
            self._ended = command[0] in ENDS
        elif message.kind in (Kind.SOUND, Kind.PICTURE, Kind.DATA) and message.body:
            self._tag(message.kind, message.at_ms, message.body.removeprefix(SET_DATA))

    def _tag(self, kind: int, at_ms: int, body: bytes) -> None:
        if not self._described:
            # Said to be there is what the description names: FFmpeg waits for it. Without one it may be both.
            self._described = True
            names = body if kind == Kind.DATA else b"audiocodecid videocodecid"
            there = (b"audiocodecid" in names) << 2 | (b"videocodecid" in names)
            self._ready += struct.pack(">3sBBII", b"FLV", 1, there, 9, 0)
        size = len(body)
        self._ready += (
            struct.pack(
                ">BBHBHBBH", kind, size >> 16, size & 0xFFFF, (at_ms >> 16) & 0xFF, at_ms & 0xFFFF, at_ms >> 24, 0, 0
            )
            + body
            + struct.pack(">I", size + 11)
        )
