"""Pushes by RTMP: a server gets what was muxed, and one that keeps silent, refuses or hangs up costs nobody else anything."""

from __future__ import annotations

import datetime
import io
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from services.egress.live import rtmp_push
from services.egress.live.h264 import EncodedFrame, SharedEncoder
from services.egress.live.muxers import RtmpMuxer
from services.egress.sinks.port import OutFrame, SinkError
from services.ingest.sources.rtmp import Publisher
from shared.contracts.events import AudioCaptured
from shared.contracts.sinks import RtmpSink
from shared.media.addresses import AddressRules
from shared.media.audio_header import make_header
from shared.media.rtmp.application import application_of
from shared.media.rtmp.messages import RtmpError
from tests.support import clips

LOOPBACK = AddressRules(private=True)
FRAMES = 30


class Encoded:
    """A few frames, ten a second, and their sound."""

    def __init__(self, folder: Path, codec: str = "aac") -> None:
        self.encoder = SharedEncoder(96, 64, Fraction(10))
        self.frames: list[EncodedFrame] = []
        for index in range(FRAMES):
            frame = OutFrame(clips.moving(index, 96, 64), index, 1, Fraction(1, 10))
            self.frames += self.encoder.encode(frame, index % 10 == 0)
        self.header, self.parts = b"", list[AudioCaptured]()
        clip = clips.make_clip(folder / "sound.mp4", frames=30, fps=10, audio=clips.Audio(codec, seconds=3.0))
        with av.open(str(clip)) as container:
            stream: Any = container.streams.audio[0]
            for packet in container.demux(stream):
                if packet.pts is None:
                    continue
                self.header = self.header or make_header(stream, bytes(packet), packet.duration)
                self.parts.append(
                    AudioCaptured(
                        stream="s",
                        epoch=1,
                        seq=len(self.parts),
                        extradata=stream.codec_context.extradata or b"",
                        codec=codec,
                        layout="mono",
                        sample_rate=stream.codec_context.sample_rate,
                        time_base=(packet.time_base.numerator, packet.time_base.denominator),
                        packets=((packet.pts, packet.dts, packet.duration, bytes(packet)),),
                    )
                )

    def into(self, muxer: RtmpMuxer) -> None:
        """Pictures and sound as a feed gives them."""
        parts = list(self.parts)
        for frame in self.frames:
            muxer.video(frame)
            while parts and parts[0].packets[0][0] * Fraction(*parts[0].time_base) <= frame.pts * frame.time_base:
                muxer.audio(parts.pop(0))


class Server:
    """A socket that does ``serve`` with each connection, in a thread; what that raises is kept."""

    def __init__(self, serve: Callable[[socket.socket], None], tls: ssl.SSLContext | None = None) -> None:
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        self.raised: list[BaseException] = []
        self._serve, self._tls = serve, tls
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            while True:
                sock, _ = self._listening.accept()
                try:
                    self._serve(self._tls.wrap_socket(sock, server_side=True) if self._tls else sock)
                except Exception as error:
                    self.raised.append(error)
                finally:
                    sock.close()
        except OSError:
            return

    def close(self) -> None:
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        self._thread.join(5)


@contextmanager
def server(serve: Callable[[socket.socket], None], tls: ssl.SSLContext | None = None) -> Iterator[Server]:
    made = Server(serve, tls)
    try:
        yield made
    finally:
        made.close()


class Kept:
    """Lets publishers in and keeps their FLV."""

    def __init__(self, key: str = "key") -> None:
        self.flv, self.ended = bytearray(), threading.Event()
        self._key = key

    def __call__(self, sock: socket.socket) -> None:
        publisher = Publisher(sock, self._key, 5.0, lambda: False)
        while data := publisher.read(1 << 16):
            self.flv += data
        self.ended.set()

    def packets(self) -> dict[str, list[float]]:
        """When each track's packets are shown."""
        assert self.ended.wait(5)
        found: dict[str, list[float]] = {}
        with av.open(io.BytesIO(bytes(self.flv)), "r", format="flv") as container:
            for packet in container.demux():
                if packet.pts is not None:
                    found.setdefault(packet.stream.type, []).append(float(packet.pts * packet.time_base))
            return found


def muxer_to(url: str) -> RtmpMuxer:
    return RtmpMuxer(RtmpSink(id="push", url=url), LOOPBACK)


@pytest.mark.parametrize("codec", ["aac", "libmp3lame"])
def test_a_server_gets_every_picture_and_the_sound_at_their_times(tmp_path: Path, codec: str) -> None:
    made, kept = Encoded(tmp_path, codec), Kept()
    with server(kept) as there:
        muxer = muxer_to(f"rtmp://127.0.0.1:{there.port}/live/key")
        muxer.open(made.encoder, made.header)
        made.into(muxer)
        muxer.close()
        packets = kept.packets()
    assert packets["video"] == pytest.approx([index / 10 for index in range(FRAMES)], abs=0.001)
    assert len(packets["audio"]) > 100
    assert packets["audio"] == sorted(packets["audio"])


def test_times_past_four_hours_are_told_as_they_are() -> None:
    """A millisecond count of more than three bytes: with every piece of a message, or nothing is in its place after it."""
    kept, hours = Kept(), 5 * 3_600_000
    with server(kept) as there:
        url = f"rtmp://127.0.0.1:{there.port}/live/key"
        push = rtmp_push.RtmpPush(rtmp_push_target(url), LOOPBACK)
        push.write(b"FLV\x01\x01\x00\x00\x00\x09\x00\x00\x00\x00")
        for number in range(3):
            body, at_ms = bytes([number]) * 10_000, hours + number
            head = bytes([9]) + len(body).to_bytes(3, "big") + (at_ms & 0xFFFFFF).to_bytes(3, "big")
            push.write(head + bytes([at_ms >> 24, 0, 0, 0]) + body + bytes(4))
        push.end()
        assert kept.ended.wait(5)
    assert len(kept.flv) == 13 + 3 * (11 + 10_000 + 4)
    for number in range(3):
        tag = kept.flv[13 + number * 10_015 :]
        assert int.from_bytes(tag[4:7], "big") | tag[7] << 24 == hours + number
        assert tag[11:10_011] == bytes([number]) * 10_000


def rtmp_push_target(url: str) -> Any:
    return rtmp_push.Target(url, "rtmp", "127.0.0.1", int(url.split(":")[2].partition("/")[0]))


@pytest.mark.parametrize(
    ("path", "application", "key"),
    [
        ("/live/key", "live", "key"),
        ("/live/key?token=a/b", "live", "key?token=a/b"),
        ("/app/instance/key", "app/instance", "key"),
        ("/live2/a-b_c", "live2", "a-b_c"),
        ("/live", "live", ""),
    ],
)
def test_application_and_key_are_read_as_others_read_them(path: str, application: str, key: str) -> None:
    assert application_of(f"rtmp://host:1935{path}") == (application, key)


def silent(sock: socket.socket) -> None:
    while sock.recv(1 << 16):
        pass


def test_a_server_that_keeps_silent_is_given_up_and_stops_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does any other thread stand still meanwhile."""
    monkeypatch.setattr(rtmp_push, "SILENT_S", 0.7)
    gaps, ending = list[float](), threading.Event()

    def tick() -> None:
        before = time.monotonic()
        while not ending.wait(0.01):
            now = time.monotonic()
            gaps.append(now - before)
            before = now

    ticking = threading.Thread(target=tick)
    ticking.start()
    began = time.monotonic()
    with server(silent) as there:
        muxer = muxer_to(f"rtmp://127.0.0.1:{there.port}/live/secret")
        with pytest.raises(SinkError, match="cannot be reached") as told:
            muxer.open(SharedEncoder(96, 64, Fraction(10)), b"")
    took = time.monotonic() - began
    ending.set()
    ticking.join()
    assert "secret" not in str(told.value)
    assert 0.5 < took < 5
    assert max(gaps) < 0.5


def test_a_server_that_reads_no_more_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rtmp_push, "SILENT_S", 0.5)
    let_in = threading.Event()

    def serve(sock: socket.socket) -> None:
        Publisher(sock, "key", 5.0, lambda: False)
        let_in.wait(10)

    with server(serve) as there:
        push = rtmp_push.RtmpPush(rtmp_push_target(f"rtmp://127.0.0.1:{there.port}/live/key"), LOOPBACK)
        push.write(b"FLV\x01\x01\x00\x00\x00\x09\x00\x00\x00\x00")
        tag = bytes([9]) + (1 << 20).to_bytes(3, "big") + bytes(7) + bytes(1 << 20) + bytes(4)

        def write_on() -> None:
            for _ in range(64):
                push.write(tag)

        with pytest.raises(TimeoutError):
            write_on()
        push.close()
        let_in.set()


def test_who_is_refused_is_told_why() -> None:
    with server(Kept("another")) as there:
        with pytest.raises(SinkError, match="this key is not expected here"):
            muxer_to(f"rtmp://127.0.0.1:{there.port}/live/key").open(SharedEncoder(96, 64, Fraction(10)), b"")
        with pytest.raises(SinkError, match=r"Connect\.Rejected"):
            muxer_to(f"rtmp://127.0.0.1:{there.port}/other/key").open(SharedEncoder(96, 64, Fraction(10)), b"")
        assert all(isinstance(error, RtmpError) for error in there.raised)


def test_a_server_that_hangs_up_breaks_the_sink_and_it_may_be_opened_again(tmp_path: Path) -> None:
    made = Encoded(tmp_path)

    def serve(sock: socket.socket) -> None:
        Publisher(sock, "key", 5.0, lambda: False).read(1)

    with server(serve) as there:
        muxer = muxer_to(f"rtmp://127.0.0.1:{there.port}/live/key")
        muxer.open(made.encoder, made.header)
        assert muxer.again

        def go_on() -> None:
            for _ in range(200):
                made.into(muxer)
                muxer._last_dts.clear()
                time.sleep(0.01)

        with pytest.raises(SinkError, match="it is tried again"):
            go_on()
        with suppress(SinkError):
            muxer.close()


def test_the_connection_goes_to_the_address_that_was_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The name may lead elsewhere a moment later."""
    asked: list[str] = []
    find = socket.getaddrinfo

    def resolves(host: str, *more: Any, **named: Any) -> Any:
        if host == "cdn.example":
            asked.append(host)
            host = "127.0.0.1" if len(asked) == 1 else "127.0.0.99"
        return find(host, *more, **named)

    monkeypatch.setattr(socket, "getaddrinfo", resolves)
    kept = Kept()
    with server(kept) as there:
        muxer = muxer_to(f"rtmp://cdn.example:{there.port}/live/key")
        encoder = SharedEncoder(96, 64, Fraction(10))
        encoder.encode(OutFrame(np.zeros((64, 96, 3), np.uint8), 0, 1, Fraction(1, 10)), key=True)
        muxer.open(encoder, b"")
        muxer.close()
        assert kept.ended.wait(5)
    assert len(asked) == 1
    with pytest.raises(SinkError, match="private network"):
        RtmpMuxer(RtmpSink(url="rtmp://127.0.0.1/live/key"), AddressRules()).open(encoder, b"")


def certificate(folder: Path) -> Path:
    """Of 127.0.0.1, signed by itself: key and certificate in one file."""
    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test")])
    now = datetime.datetime.now(datetime.UTC)
    names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(names, critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path = folder / "server.pem"
    path.write_bytes(private + made.public_bytes(serialization.Encoding.PEM))
    return path


def test_with_tls_the_certificate_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pem, kept, made = certificate(tmp_path), Kept(), Encoded(tmp_path)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(pem)
    with server(kept, tls) as there:
        url = f"rtmps://127.0.0.1:{there.port}/live/key"
        with pytest.raises(SinkError, match="certificate verify failed"):
            muxer_to(url).open(made.encoder, b"")
        monkeypatch.setenv("SSL_CERT_FILE", str(pem))
        muxer = muxer_to(url)
        muxer.open(made.encoder, made.header)
        made.into(muxer)
        muxer.close()
        assert len(kept.packets()["video"]) == FRAMES


def test_a_port_where_nobody_listens_is_told() -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(SinkError, match="cannot be reached"):
        muxer_to(f"rtmp://127.0.0.1:{port}/live/key").open(SharedEncoder(96, 64, Fraction(10)), b"")
