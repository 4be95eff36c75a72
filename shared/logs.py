"""Logging of a service: to stderr, as text or as one JSON object a line. Nothing is ever printed on stdout."""

from __future__ import annotations

import json
import logging
import sys
import time


class JsonFormatter(logging.Formatter):
    """One object a line: time (UNIX seconds), level, service, instance, logger, message, and a traceback if any."""

    def __init__(self, service: str, instance: str) -> None:
        super().__init__()
        self._who = {"service": service, "instance": instance}

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {"time": round(record.created, 3), "level": record.levelname, **self._who}
        line["logger"] = record.name
        line["message"] = record.getMessage()
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


class TextFormatter(logging.Formatter):
    """ "12:00:00.123 INFO worker-1 services.worker.app: message"."""

    def __init__(self, instance: str) -> None:
        super().__init__(f"%(asctime)s.%(msecs)03d %(levelname)s {instance} %(name)s: %(message)s", "%H:%M:%S")
        self.converter = time.gmtime


def configure(service: str, instance: str, level: str, as_json: bool) -> None:
    """Set up the root logger of this process. Our own loggers follow ``level``, libraries stay at WARNING."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter(service, instance) if as_json else TextFormatter(instance))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    for name in ("shared", "services"):
        logging.getLogger(name).setLevel(level)
