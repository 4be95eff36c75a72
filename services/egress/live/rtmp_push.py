"""Pushes to an RTMP server: a connection to the address that was checked, and FLV tags as its messages.

FFmpeg's own RTMP holds the interpreter's lock while it connects, and knows no time limit there: one server that keeps silent
stops every stream of the process. Muxing stays FFmpeg's.
"""

from __future__ import annotations

import secrets
import select
import socket
import ssl
import time
from typing import Any

from shared.media.addresses import AddressRules, Target, resolve
from shared.media.rtmp import amf
from shared.media.rtmp.application import application_of, tc_url
from shared.media.rtmp.messages import HANDSHAKE, Kind, LeftError, Message, Messages, RtmpError

OPEN_S = 10.0  # until it is published, all in all
SILENT_S = 5.0
LARGEST = 1 << 20
CHUNK = 4096
CHANNELS = {Kind.SOUND: 4, Kind.PICTURE: 6, Kind.DATA: 5}
SET_DATA = amf.encode("@setDataFrame")
FLV_HEADER, TAG_HEADER, TAG_END = 13, 11, 4
CONNECT, RELEASE, PUBLISHED, CREATE, PUBLISH = range(1, 6)  # the numbers of our commands


class RtmpPush:
    """A file to write FLV to. Everything raises OSError; nothing waits longer than SILENT_S, opening than OPEN_S."""

    def __init__(self, target: Target, rules: AddressRules) -> None:
        self._until: float | None = time.monotonic() + OPEN_S
        self._app, self._key = application_of(target.url)
        self._held = bytearray()
        self._flv, self._passed = bytearray(), 0
        self._stream = 0
        self._sock = self._connected(target, resolve(target, rules))
        self._messages = Messages(self, self._send, LARGEST)
        try:
            self._shake_hands()
            self._publish(tc_url(target))
        except BaseException:
            self.close()
            raise
        self._until = None

    def write(self, data: bytes) -> int:
        """FLV, in any pieces."""
        self._flv += data
        if not self._passed:
            if len(self._flv) < FLV_HEADER:
                return len(data)
            del self._flv[:FLV_HEADER]
            self._passed = FLV_HEADER
        while len(self._flv) >= TAG_HEADER:
            size = int.from_bytes(self._flv[1:4], "big")
            whole = TAG_HEADER + size + TAG_END
            if len(self._flv) < whole:
                break
            kind, at_ms = self._flv[0] & 0x1F, int.from_bytes(self._flv[4:7], "big") | self._flv[7] << 24
            self._tag(kind, at_ms, bytes(self._flv[TAG_HEADER : TAG_HEADER + size]))
            del self._flv[:whole]
        self._hear()
        return len(data)

    def read(self, size: int, /) -> bytes:
        """What the server says; fewer bytes at the end only."""
        while len(self._held) < size:
            self._sock.settimeout(self._left())
            data = self._sock.recv(1 << 16)
            if not data:
                break
            self._held += data
        taken = bytes(self._held[:size])
        del self._held[:size]
        return taken

    def end(self) -> None:
        """Say that no more comes, and hang up."""
        try:
            self._command("FCUnpublish", 0, None, self._key)
            self._command("deleteStream", 0, None, self._stream)
            self._sock.shutdown(socket.SHUT_WR)
        finally:
            self.close()

    def close(self) -> None:
        """Hang up."""
        self._sock.close()

    # --- opening -----------------------------------------------------------------------------------------------------

    def _connected(self, target: Target, addresses: list[str]) -> socket.socket:
        """To the first address that answers: one of those that were checked, whatever the name means by now."""
        failure: OSError = RtmpError("it has no address")
        for address in addresses:
            try:
                sock = socket.create_connection((address, target.port), self._left())
            except OSError as error:
                failure = error
                continue
            try:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                if target.scheme == "rtmps":
                    sock.settimeout(self._left())
                    return ssl.create_default_context().wrap_socket(sock, server_hostname=target.host)
                return sock
            except BaseException:
                sock.close()
                raise
        raise failure

    def _shake_hands(self) -> None:
        self._send(b"\x03" + bytes(8) + secrets.token_bytes(HANDSHAKE - 8))
        if self._messages.exactly(1) != b"\x03":
            raise RtmpError("it speaks no RTMP")
        self._send(self._messages.exactly(HANDSHAKE))
        self._messages.exactly(HANDSHAKE)

    def _publish(self, called: str) -> None:
        told = {"app": self._app, "type": "nonprivate", "flashVer": "FMLE/3.0 (compatible; Rheocast)", "tcUrl": called}
        self._command("connect", CONNECT, told)
        self._answer(CONNECT)
        self._messages.cut_larger(CHUNK)
        self._command("releaseStream", RELEASE, None, self._key)
        self._command("FCPublish", PUBLISHED, None, self._key)
        self._command("createStream", CREATE, None)
        number = self._answer(CREATE)
        self._stream = int(number) if isinstance(number, float) else 1
        self._command("publish", PUBLISH, None, self._key, "live")
        while self._next_status() != "NetStream.Publish.Start":
            pass

    def _answer(self, number: int) -> Any:
        """The last value of a command's result. Raises RtmpError where it is refused."""
        while True:
            values = self._told(self._messages.read())
            if values[:2] == ["_result", float(number)]:
                return values[-1]
            if values[:2] == ["_error", float(number)]:
                raise RtmpError(f"it refuses: {_reason(values[-1])}")

    def _next_status(self) -> str:
        """What the server says of the stream next. Raises RtmpError where it is refused."""
        while True:
            values = self._told(self._messages.read())
            if values[:1] == ["onStatus"] and isinstance(values[-1], dict):
                if values[-1].get("level") == "error":
                    raise RtmpError(f"it refuses: {_reason(values[-1])}")
                return str(values[-1].get("code", ""))

    # --- publishing --------------------------------------------------------------------------------------------------

    def _tag(self, kind: int, at_ms: int, body: bytes) -> None:
        if kind == Kind.DATA:
            body = SET_DATA + body
        if kind in CHANNELS:
            self._messages.write(kind, body, channel=CHANNELS[Kind(kind)], stream=self._stream, at_ms=at_ms)

    def _hear(self) -> None:
        """What the server has said meanwhile: pings are answered, and that it wants no more ends it."""
        while self._has_said_something():
            message = self._messages.advance()
            values = self._told(message) if message is not None else []
            if values[:1] == ["onStatus"] and isinstance(values[-1], dict) and values[-1].get("level") == "error":
                raise RtmpError(f"it takes no more: {_reason(values[-1])}")

    def _has_said_something(self) -> bool:
        pending = self._sock.pending() if isinstance(self._sock, ssl.SSLSocket) else 0
        return bool(self._held or pending or select.select([self._sock], [], [], 0)[0])

    def _told(self, message: Message) -> list[Any]:
        """A command's values; none of another message."""
        if message.kind not in (Kind.COMMAND, Kind.COMMAND_3):
            return []
        return amf.decode(message.body[message.kind == Kind.COMMAND_3 :])

    def _command(self, *values: Any) -> None:
        self._messages.write(Kind.COMMAND, amf.encode(*values), stream=self._stream)

    def _send(self, data: bytes) -> None:
        self._sock.settimeout(self._left())
        self._sock.sendall(data)

    def _left(self) -> float:
        """Seconds that the next thing may take."""
        left = SILENT_S if self._until is None else min(SILENT_S, self._until - time.monotonic())
        if left <= 0:
            raise LeftError(f"it was not ready within {OPEN_S:g} s")
        return left


def _reason(told: Any) -> str:
    """The server's words, which may be anything: one short line of them."""
    words = str(told.get("description") or told.get("code") or "") if isinstance(told, dict) else ""
    return " ".join("".join(c if c.isprintable() else " " for c in words).split())[:160] or "without a reason"
