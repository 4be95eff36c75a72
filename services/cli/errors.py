"""Exit codes, and errors that end a command with one line."""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """What the shell sees."""

    OK = 0
    FAILED = 1  # it began and could not be finished
    REFUSED = 2  # the input or the machine will not do; nothing was begun
    INTERRUPTED = 130


class CommandError(Exception):
    """One clear line that names the fix, and the exit code."""

    def __init__(self, line: str, code: ExitCode = ExitCode.REFUSED) -> None:
        super().__init__(line)
        self.line = " ".join(line.split())
        self.code = code
