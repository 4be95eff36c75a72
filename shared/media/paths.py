"""Paths that came over the wire: only inside the folders a service was given."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from shared.media.errors import MediaError


def parse_roots(value: str) -> tuple[Path, ...]:
    """Folders joined by the platform's path separator (":" here), resolved; empty entries are ignored."""
    return tuple(Path(part).expanduser().resolve() for part in value.split(os.pathsep) if part.strip())


def inside(path: str, roots: Sequence[Path], *, verb: str) -> Path:
    """``path`` with every symbolic link resolved, if that lies in one of ``roots``. Relative paths start at the first root.

    ``verb`` is what the service may do there ("read", "write"). Raises MediaError otherwise.
    """
    if not roots:
        raise MediaError(f"{path}: this service may not {verb} files; set RHEOCAST_FILE_ROOTS to the folder it may use")
    if "\0" in path:
        raise MediaError("the path has a zero byte in it")
    try:
        real = (roots[0] / Path(path).expanduser()).resolve()
    except (OSError, RuntimeError) as error:
        raise MediaError(f"{path}: cannot be resolved ({error})") from None
    if any(real.is_relative_to(root) for root in roots):
        return real
    allowed = ", ".join(str(root) for root in roots)
    raise MediaError(
        f"{path}: outside the folders this service may {verb} ({allowed}); add its folder to RHEOCAST_FILE_ROOTS"
    )
