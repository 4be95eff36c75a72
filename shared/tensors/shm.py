"""Shared-memory segments: files under ``/dev/shm`` that any process of the host maps by name.

Made with O_CREAT|O_EXCL and mmap rather than ``multiprocessing.shared_memory``, whose resource tracker unlinks what
others still use when a process is killed. Names start with ``rheocast-<run id>-``, so a supervisor can sweep a run;
owners hold a file lock for life, so anyone can tell a dead owner's segments.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import struct
from collections import OrderedDict
from pathlib import Path

from shared.tensors.port import StaleTensorError

PREFIX = "rheocast-"
MAX_MAPPED = 256  # segments of others that a reader keeps mapped

# A slot's header: the lease's generation (0: none), the generation that a reader released, the tensor's bytes.
_U64 = struct.Struct("<Q")
GENERATION_AT = 0
RELEASED_AT = 8
SIZE_AT = 16


def run_prefix(run_id: str) -> str:
    """How the segment names of a run begin. '-' separates the parts of a name, so it is replaced in them."""
    return f"{PREFIX}{run_id.replace('-', '_')}-"


def segment_name(run_id: str, instance: str, number: str) -> str:
    """The file name of one segment; ``number`` is unique within the instance's life."""
    return f"{run_prefix(run_id)}{instance.replace('-', '_')}-{number}"


class Mapping:
    """A mapped segment and its slot headers. An owner's also holds the file, locked."""

    def __init__(self, memory: mmap.mmap, fd: int = -1) -> None:
        """``fd`` is the owner's locked file; the mapping closes it."""
        self.memory = memory
        self._fd = fd

    def generation(self, header: int) -> int:
        """The lease in the slot whose header stands at ``header``; 0: none."""
        return _U64.unpack_from(self.memory, header + GENERATION_AT)[0]

    def set_generation(self, header: int, generation: int) -> None:
        """By the owner: 0 while it writes the data, the lease's generation afterwards."""
        _U64.pack_into(self.memory, header + GENERATION_AT, generation)

    def set_size(self, header: int, size: int) -> None:
        """By the owner, before the generation: the bytes of the tensor in the slot."""
        _U64.pack_into(self.memory, header + SIZE_AT, size)

    def size(self, header: int) -> int:
        """The bytes of the tensor in the slot."""
        return _U64.unpack_from(self.memory, header + SIZE_AT)[0]

    def released(self, header: int) -> int:
        """The generation that a reader has released last."""
        return _U64.unpack_from(self.memory, header + RELEASED_AT)[0]

    def set_released(self, header: int, generation: int) -> None:
        """By a reader: it is done with this generation. The owner frees the slot when it is still the lease."""
        _U64.pack_into(self.memory, header + RELEASED_AT, generation)

    def close(self) -> None:
        """Unmap. A copy that another thread is just making keeps the memory until it is done."""
        with contextlib.suppress(BufferError):
            self.memory.close()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def create(path: Path, size: int) -> Mapping:
    """A new segment, its memory reserved: a full file system is an OSError here, not a SIGBUS later."""
    fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.posix_fallocate(fd, 0, size)
        memory = mmap.mmap(fd, size, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
    except BaseException:
        os.close(fd)
        path.unlink(missing_ok=True)
        raise
    return Mapping(memory, fd)


def attach(path: Path) -> Mapping:
    """Another process's segment. Raises StaleTensorError when it is gone."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        raise StaleTensorError(f"segment {path.name} is gone: its owner has ended") from None
    try:
        return Mapping(mmap.mmap(fd, 0))
    finally:
        os.close(fd)


class Mapped:
    """Other processes' segments that stay mapped, the least recently used given up first."""

    def __init__(self, shm_dir: Path, limit: int = MAX_MAPPED) -> None:
        self._shm_dir = shm_dir
        self._limit = limit
        self._mapped: OrderedDict[str, Mapping] = OrderedDict()

    def of(self, segment: str) -> Mapping:
        """The mapping of ``segment``. Raises StaleTensorError when it is gone, or its name is none of ours."""
        mapping = self._mapped.get(segment)
        if mapping is not None:
            self._mapped.move_to_end(segment)
            return mapping
        if not segment.startswith(PREFIX) or "/" in segment:
            raise StaleTensorError(f"{segment!r} is no segment name")
        mapping = self._mapped[segment] = attach(self._shm_dir / segment)
        while len(self._mapped) > self._limit:
            self._mapped.popitem(last=False)[1].close()
        return mapping

    def forget_unlinked(self) -> None:
        """Unmap what its owner has unlinked: it would hold the memory for ever."""
        for segment in [name for name in self._mapped if not (self._shm_dir / name).exists()]:
            self._mapped.pop(segment).close()

    def close(self) -> None:
        """Unmap everything."""
        while self._mapped:
            self._mapped.popitem()[1].close()


def sweep_run(shm_dir: Path | str, run_id: str) -> int:
    """Unlink every segment of a run; how many there were. For the supervisor, once all services have ended."""
    return _unlink(path for path in Path(shm_dir).glob(run_prefix(run_id) + "*"))


def sweep_instance(shm_dir: Path | str, run_id: str, instance: str) -> int:
    """Unlink what an earlier life of this instance left behind; how many there were."""
    return _unlink(path for path in Path(shm_dir).glob(segment_name(run_id, instance, "*")) if not is_owned(path))


def sweep_dead(shm_dir: Path | str) -> int:
    """Unlink every segment, of any run, whose owner is dead; how many there were."""
    return _unlink(path for path in Path(shm_dir).glob(PREFIX + "*") if not is_owned(path))


def is_owned(path: Path) -> bool:
    """Whether a living process owns this segment: its lock ends with it, however it ends."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return path.exists()
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    else:
        return False
    finally:
        os.close(fd)


def _unlink(paths: object) -> int:
    count = 0
    for path in list(paths):  # type: ignore[call-overload]
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
            count += 1
    return count
