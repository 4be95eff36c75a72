"""Logging of a service: to stderr, as one JSON object a line, or as text on a terminal. Nothing is ever printed on stdout.

A line knows what it is about: the stream and the trace of the message that is being handled (:data:`ABOUT`), or of the span
that is under way. Both are found out when something is logged, so they cost nothing else.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from opentelemetry import trace

from shared.telemetry.propagation import span_context_of

ABOUT: ContextVar[object | None] = ContextVar("about", default=None)
"""What is being handled: a message of the bus, or a chunk's stamp. Tasks that a handler starts inherit it."""


@contextmanager
def about(what: object) -> Iterator[None]:
    """``with about(stamp):`` what is logged inside belongs to it."""
    token = ABOUT.set(what)
    try:
        yield
    finally:
        ABOUT.reset(token)


def facts() -> dict[str, str]:
    """``stream``, ``trace_id`` and ``span_id``, as far as they are known here and now."""
    what: Any = ABOUT.get()
    stamps = getattr(what, "stamps", None) or ()
    stamp = getattr(what, "stamp", None) or (stamps[0] if stamps else what)
    stream = getattr(stamp, "stream", "") or getattr(what, "stream", "")
    context = trace.get_current_span().get_span_context()
    if not context.is_valid:
        context = span_context_of(getattr(stamp, "trace", "") or "")
    found = {"stream": stream} if isinstance(stream, str) and stream else {}
    if context is not None:
        found |= {"trace_id": f"{context.trace_id:032x}", "span_id": f"{context.span_id:016x}"}
    return found


class JsonFormatter(logging.Formatter):
    """One object a line: time (UNIX seconds), level, service, instance, logger, message, what it is about, and a traceback
    if any."""

    def __init__(self, service: str, instance: str) -> None:
        super().__init__()
        self._who = {"service": service, "instance": instance}

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {"time": round(record.created, 3), "level": record.levelname, **self._who}
        line["logger"] = record.name
        line["message"] = record.getMessage()
        line |= facts()
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


class TextFormatter(logging.Formatter):
    """ "12:00:00.123 INFO worker-1 services.worker.app: message"."""

    def __init__(self, instance: str) -> None:
        super().__init__(f"%(asctime)s.%(msecs)03d %(levelname)s {instance} %(name)s: %(message)s", "%H:%M:%S")
        self.converter = time.gmtime


def configure(service: str, instance: str, level: str, as_json: bool | None = None) -> None:
    """Set up the root logger of this process. Our own loggers follow ``level``, libraries stay at WARNING.

    ``as_json`` None: unless stderr is a terminal.
    """
    handler = logging.StreamHandler(sys.stderr)
    as_json = not sys.stderr.isatty() if as_json is None else as_json
    handler.setFormatter(JsonFormatter(service, instance) if as_json else TextFormatter(instance))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    for name in ("shared", "services"):
        logging.getLogger(name).setLevel(level)
