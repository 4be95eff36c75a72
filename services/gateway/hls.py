"""The HLS files of a stream that ended, which are not those of the next stream of its id."""

from __future__ import annotations

import asyncio
import secrets
import shutil
from contextlib import suppress
from pathlib import Path

from services.gateway.core import HLS, PathRefusedError, inside
from services.gateway.errors import ConflictError
from shared.contracts import subjects

GONE = ".gone-"  # no stream's id begins so: what is being removed is not served


async def drop_hls(media_dir: Path, stream: str) -> None:
    """Remove the stream's folder; egress makes one with the first picture. Raises ConflictError when that cannot be done."""
    if subjects.is_token(stream):
        await asyncio.to_thread(_drop, media_dir, stream)


def _drop(media_dir: Path, stream: str) -> None:
    try:
        root = inside(media_dir, HLS)
    except PathRefusedError:
        return  # nothing of it is served either
    gone = root / f"{GONE}{secrets.token_hex(6)}"
    try:
        (root / stream).rename(gone)  # at once, and of a link the link itself
    except FileNotFoundError:
        return
    except OSError:
        raise ConflictError(
            f"stream {stream} has HLS files of one before it, and they cannot be removed: give another id"
        ) from None
    if gone.is_symlink():
        with suppress(OSError):
            gone.unlink()
    else:
        shutil.rmtree(gone, ignore_errors=True)
