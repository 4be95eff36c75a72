"""Ctrl-C at a moment when it could be lost: inside an import or a C extension an exception may be swallowed."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any


class HeldInterrupt:
    """While this context lasts Ctrl-C raises nothing; ``noted`` says that it came. Main thread only."""

    def __init__(self) -> None:
        self.noted = False
        self._former: Any = None

    def __enter__(self) -> HeldInterrupt:
        self._former = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        signal.signal(signal.SIGINT, self._former)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.noted = True
