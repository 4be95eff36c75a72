"""A gateway without a machine behind it: the page's own files, and streams that only seem to run. It counts what is held.

As the real one it speaks HTTP/1.1, so a browser gives it six connections and lets every further request wait.
"""

from __future__ import annotations

import io
import json
import mimetypes
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from PIL import Image

from services.gateway.api.pages import PAGE_DIR

PICTURE_S = 0.1
SNAPSHOT_S = 0.05
STATS_S = 0.3
Held = tuple[str, str]


def jpeg(red: int) -> bytes:
    """A flat picture."""
    out = io.BytesIO()
    Image.new("RGB", (64, 40), (red, 160, 90)).save(out, "JPEG")
    return out.getvalue()


def view_of(stream: str, kind: str) -> dict[str, Any]:
    """What the page needs of a stream's view."""
    return {
        "id": stream,
        "state": "live",
        "reason": "",
        "source_kind": kind,
        "prompt": f"prompt of {stream}",
        "prompt_version": 1,
        "paused": False,
        "model": "rheo-tiny",
        "steps": 2,
        "seed": 0,
        "width": 64,
        "height": 40,
    }


class FakeGateway:
    """Its streams, what is asked of it (``asked``: "METHOD path"), and which long answers are under way (``held``).

    ``resumed``: the Last-Event-ID of each call of ``/events``, by stream. ``ice``: the answers of ``/v1/ice-servers`` in order,
    the last for ever; None fails. ``glances_at_once``: the most snapshots that were asked for at the same time.
    """

    def __init__(self, streams: int = 0) -> None:
        self.views = {f"s{n}": view_of(f"s{n}", "file") for n in range(1, streams + 1)}
        self.asked: list[str] = []
        self.held: Counter[Held] = Counter()
        self.resumed: dict[str, list[str]] = {}
        self.told: dict[str, list[dict[str, Any]]] = {}
        self.ice: list[list[dict[str, Any]] | None] = [[]]
        self.glances_at_once = 0
        self.glances = 0
        self.lock = threading.Lock()
        self.over = threading.Event()
        gateway = self

        class Handler(_Handler):
            fake = gateway

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self.server.server_address[1]}"

    def holds(self) -> set[Held]:
        """The long answers now, as (stream, "events" and so on)."""
        with self.lock:
            return {held for held, many in self.held.items() if many}

    def times(self, asked: str) -> int:
        """How often this was asked."""
        return self.asked.count(asked)

    def tell(self, stream: str, event: str, reason: str) -> str:
        """An event of a stream; its id."""
        ident = str(time.time_ns())
        self.told.setdefault(stream, []).append(
            {"id": ident, "event": event, "reason": reason, "at_ns": int(ident), "stream": stream}
        )
        return ident

    def end(self, stream: str, state: str, reason: str) -> None:
        """The stream is over."""
        self.views[stream] = {**self.views[stream], "state": state, "reason": reason}

    @contextmanager
    def running(self) -> Iterator[FakeGateway]:
        """Serve meanwhile."""
        thread = threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self.over.set()
            self.server.shutdown()
            self.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    fake: FakeGateway

    def log_message(self, format: str, *args: object) -> None:
        pass

    def handle(self) -> None:
        with suppress(ConnectionError, TimeoutError):  # the page let go
            super().handle()

    def answer(self, status: int, body: bytes = b"", kind: str = "application/json", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def json(self, told: object, status: int = 200) -> None:
        self.answer(status, json.dumps(told).encode())

    def hold(self, stream: str, what: str, kind: str, parts: Iterator[bytes]) -> None:
        """A long answer, until the page lets go of it."""
        with self.fake.lock:
            self.fake.held[stream, what] += 1
        try:
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for part in parts:
                self.wfile.write(f"{len(part):x}\r\n".encode() + part + b"\r\n")
                self.wfile.flush()
            self.wfile.write(b"0\r\n\r\n")
        finally:
            with self.fake.lock:
                self.fake.held[stream, what] -= 1

    def pictures(self) -> Iterator[bytes]:
        red = 0
        while not self.fake.over.wait(PICTURE_S):
            red = (red + 40) % 256
            data = jpeg(red)
            head = f"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: {len(data)}\r\n\r\n"
            yield head.encode() + data + b"\r\n"

    def events(self, stream: str, after: int) -> Iterator[bytes]:
        while not self.fake.over.wait(STATS_S):
            for told in list(self.fake.told.get(stream, [])):
                if int(told["id"]) > after:
                    after = int(told["id"])
                    yield f"id: {after}\nevent: {told['event']}\ndata: {json.dumps(told)}\n\n".encode()
            yield b'event: stats\ndata: {"fps": 8.0, "latency_ms": 300.0, "on_time": 1.0}\n\n'

    def glance(self) -> None:
        fake = self.fake
        with fake.lock:
            fake.glances += 1
            fake.glances_at_once = max(fake.glances_at_once, fake.glances)
        time.sleep(SNAPSHOT_S)
        with fake.lock:
            fake.glances -= 1
        self.answer(200, jpeg(200), "image/jpeg")

    def serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = self.path.partition("?")[0]
        self.fake.asked.append(f"{self.command} {path}")
        if path == "/v1/ice-servers":
            told = self.fake.ice.pop(0) if len(self.fake.ice) > 1 else self.fake.ice[0]
            return self.json({"title": "no"}, 500) if told is None else self.json({"iceServers": told})
        if path == "/v1/streams":
            if self.command == "GET":
                return self.json({"streams": list(self.fake.views.values())})
            stream = f"made{len(self.fake.views)}"
            self.fake.views[stream] = view_of(stream, json.loads(body)["source"]["kind"])
            return self.json(self.fake.views[stream], 201)
        if path.startswith("/v1/streams/"):
            stream, _, part = path.removeprefix("/v1/streams/").partition("/")
            return self.of_stream(stream, part) if stream in self.fake.views else self.json({"title": "none"}, 404)
        if path.startswith("/v1/"):
            return self.json({"models": [], "styles": [], "offers": []})
        file = PAGE_DIR / (path.strip("/") or "index.html")
        return self.answer(200, file.read_bytes(), mimetypes.guess_type(file.name)[0] or "text/plain")

    def of_stream(self, stream: str, part: str) -> None:
        fake = self.fake
        if part == "events":
            after = self.headers.get("Last-Event-ID", "")
            fake.resumed.setdefault(stream, []).append(after)
            return self.hold(stream, part, "text/event-stream", self.events(stream, int(after or time.time_ns())))
        if part in ("mjpeg", "source/mjpeg"):
            return self.hold(stream, part, "multipart/x-mixed-replace; boundary=frame", self.pictures())
        if part == "snapshot.jpg":
            return self.glance()
        if part == "stats":
            return self.json({"live": {"fps": 8.0, "latency_ms": 300.0, "on_time": 1.0}})
        if part in ("whip", "whep"):
            return self.json({"title": "Not here"}, 404)
        if part.startswith("receipts/"):
            return self.json({"state": "applied", "command": part.partition("/")[2], "chunk": 3, "until_chunk": -1})
        if self.command == "DELETE":
            del fake.views[stream]
            return self.answer(204)
        if self.command == "GET":
            return self.json(fake.views[stream])
        return self.json({"command": f"c{len(fake.asked)}", "version": 2})

    do_GET = do_POST = do_PATCH = do_PUT = do_DELETE = serve
