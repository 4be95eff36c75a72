"""A real HTTP server that gives the answers a test has laid out, as the gateway would."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Answering:
    """Gives the next answer (status, body) to each request, the last one again and again; keeps what was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []
        self.answers: list[tuple[int, dict[str, Any]]] = []
        answering = self

        class Handler(BaseHTTPRequestHandler):
            def _answer(self) -> None:
                answering.asked.append((self.command, self.path))
                status, body = answering.answers.pop(0) if len(answering.answers) > 1 else answering.answers[0]
                data = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_POST = do_DELETE = _answer

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"


@contextmanager
def answering() -> Iterator[Answering]:
    """It listens meanwhile."""
    made = Answering()
    thread = threading.Thread(target=made.server.serve_forever, daemon=True)
    thread.start()
    try:
        yield made
    finally:
        made.server.shutdown()
        made.server.server_close()
        thread.join()
