"""The one error of this package."""

from __future__ import annotations


class MediaError(ValueError):
    """A file that cannot be used. The message is one line and names the fix."""


def one_line(error: BaseException, limit: int = 200) -> str:
    """The first line of an error's text, or its type when it has none."""
    text = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    return text.splitlines()[0][:limit]
