"""Uploads and recordings: each tenant's folder in the media folder, with names that cannot lead out of it."""

from __future__ import annotations

import asyncio
import re
import secrets
from collections.abc import AsyncIterator, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import anyio
from pydantic import BaseModel, Field

from services.gateway.core import inside
from services.gateway.errors import BusyError, InvalidError, SlowError, TooLargeError, UnknownPartError
from shared.contracts.views import FileView

MAX_FILES = 1000  # listed of a tenant
MAX_AT_ONCE = 4  # of a tenant
MAX_IN_ALL = 64
PIECE_S = 30.0  # a client that sends nothing for so long is let go
HEAD_BYTES = 512  # enough to see what a file is
MAX_STEM = 60
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,120}$"
PART = ".part"

_EXTENSIONS = {
    "mp4": ("mp4", "m4v", "mov"),
    "matroska": ("mkv", "webm"),
    "mpegts": ("ts", "m2ts"),
    "avi": ("avi",),
    "flv": ("flv",),
    "ogg": ("ogv", "ogg"),
    "gif": ("gif",),
    "jpeg": ("jpg", "jpeg"),
    "png": ("png",),
    "webp": ("webp",),
}
"""What a file may be, and the endings it may have; the first when its name has another."""


class FileList(BaseModel):
    """The newest first."""

    files: list[FileView]
    bytes: int = Field(description="Of all of them.")
    limit_bytes: int | None = Field(default=None, description="What all of them may have together.")


def kind_of(head: bytes) -> str | None:
    """What a file is by its first bytes, or None for none of those that ingest may open. Ingest looks closer."""
    if head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"):
        return "mp4"
    if head.startswith(b"RIFF") and len(head) >= 12:
        return {b"AVI ": "avi", b"WEBP": "webp"}.get(head[8:12])
    if head[:1] == b"\x47" and len(head) > 188 and head[188:189] == b"\x47":
        return "mpegts"
    magics = {
        b"\x1a\x45\xdf\xa3": "matroska",
        b"FLV\x01": "flv",
        b"OggS": "ogg",
        b"GIF87a": "gif",
        b"GIF89a": "gif",
        b"\xff\xd8\xff": "jpeg",
        b"\x89PNG\r\n\x1a\n": "png",
    }
    return next((kind for magic, kind in magics.items() if head.startswith(magic)), None)


def safe_name(wanted: str, kind: str, mark: str) -> str:
    """A file's name here: what of the client's is harmless, made unlike any other by ``mark``."""
    stem, _, ending = wanted.replace("\\", "/").rpartition("/")[2].rpartition(".")
    stem = re.sub(r"[^A-Za-z0-9_-]+", "-", stem or ending).strip("-_")[:MAX_STEM] or "upload"
    endings = _EXTENSIONS[kind]
    return f"{stem}-{mark}.{ending.lower() if ending.lower() in endings else endings[0]}"


@dataclass(frozen=True, slots=True)
class Folder:
    """One kind of a tenant's files: ``uploads`` or ``recordings``."""

    media_dir: Path
    kind: str

    def of(self, tenant: str) -> Path:
        """The tenant's folder. Raises PathRefusedError when a link leads out of the media folder."""
        return inside(self.media_dir, f"{self.kind}/{tenant}")

    async def list(self, tenant: str, limit_bytes: int | None = None) -> FileList:
        """The tenant's finished files."""
        files = await asyncio.to_thread(self._list, tenant)
        return FileList(files=files[:MAX_FILES], bytes=sum(each.bytes for each in files), limit_bytes=limit_bytes)

    def _list(self, tenant: str) -> list[FileView]:
        folder, found = self.of(tenant), list[FileView]()
        for path in folder.iterdir() if folder.is_dir() else ():
            if not path.is_symlink() and path.is_file() and re.fullmatch(NAME, path.name) and path.suffix != PART:
                state = path.stat()
                name = f"{self.kind}/{tenant}/{path.name}"
                found.append(FileView(name=path.name, path=name, bytes=state.st_size, modified_ns=state.st_mtime_ns))
        return sorted(found, key=lambda each: -each.modified_ns)

    async def find(self, tenant: str, name: str) -> Path:
        """A finished file. Raises UnknownPartError."""
        path = inside(self.media_dir, f"{self.kind}/{tenant}/{name}")
        if not re.fullmatch(NAME, name) or not await asyncio.to_thread(path.is_file):
            raise UnknownPartError(f"there is no {name[:80]!r} among your {self.kind}")
        return path

    async def delete(self, tenant: str, name: str) -> None:
        """Forget a file. Raises UnknownPartError."""
        path = await self.find(tenant, name)
        await asyncio.to_thread(path.unlink, True)


@dataclass(slots=True)
class _Taking:
    """A tenant's uploads under way: how many, their bytes so far, and those that have become files meanwhile."""

    busy: int = 0
    running: int = 0
    finished: int = 0


class Uploads:
    """Takes files in. ``max_bytes`` of one, ``tenant_bytes`` of all of a tenant's together."""

    def __init__(self, folder: Folder, max_bytes: int, tenant_bytes: int) -> None:
        self._folder, self._max_bytes, self._tenant_bytes = folder, max_bytes, tenant_bytes
        self._taking: dict[str, _Taking] = {}

    async def list(self, tenant: str) -> FileList:
        """What the tenant has uploaded."""
        return await self._folder.list(tenant, self._tenant_bytes)

    async def take(self, tenant: str, name: str, announced: int | None, body: AsyncIterator[bytes]) -> FileView:
        """Write a body to a file as it comes.

        Raises TooLargeError, InvalidError for what is no video or picture, SlowError when nothing comes, BusyError.
        """
        with self._slot(tenant) as taking:
            if announced is not None and announced > self._max_bytes:
                raise TooLargeError(f"an upload may have {self._max_bytes} bytes")
            return await self._take(tenant, name, body, taking)

    @contextmanager
    def _slot(self, tenant: str) -> Generator[_Taking]:
        """One of the tenant's, taken before anything is awaited: another tenant's clients cannot have them all."""
        taking = self._taking.get(tenant) or _Taking()
        if taking.busy >= MAX_AT_ONCE:
            raise BusyError(f"{MAX_AT_ONCE} of your uploads are under way: try again when one is done")
        if sum(each.busy for each in self._taking.values()) >= MAX_IN_ALL:
            raise BusyError(f"{MAX_IN_ALL} uploads are under way: try again")
        self._taking[tenant] = taking
        taking.busy += 1
        try:
            yield taking
        finally:
            taking.busy -= 1
            if not taking.busy:
                del self._taking[tenant]

    async def _take(self, tenant: str, name: str, body: AsyncIterator[bytes], taking: _Taking) -> FileView:
        kept = await self._kept(tenant, taking)
        folder = self._folder.of(tenant)
        await asyncio.to_thread(folder.mkdir, parents=True, exist_ok=True)
        mark = secrets.token_hex(3)
        part = folder / f"upload-{mark}{PART}"
        written = 0
        try:
            head = b""
            async with await anyio.open_file(part, "xb") as file:
                async for piece in in_time(body):
                    written += len(piece)
                    taking.running += len(piece)
                    if written > self._max_bytes:
                        raise TooLargeError(f"an upload may have {self._max_bytes} bytes")
                    if kept + taking.finished + taking.running > self._tenant_bytes:
                        kept = await self._kept(tenant, taking)  # some may have been deleted
                        if kept + taking.finished + taking.running > self._tenant_bytes:
                            raise TooLargeError(
                                f"your uploads may have {self._tenant_bytes} bytes together: delete some first"
                            )
                    head = (head + piece[:HEAD_BYTES])[:HEAD_BYTES] if len(head) < HEAD_BYTES else head
                    if len(head) == HEAD_BYTES and kind_of(head) is None:
                        raise InvalidError("the file is no video or picture that could be streamed")
                    await file.write(piece)
            kind = kind_of(head)
            if kind is None:
                raise InvalidError("the file is no video or picture that could be streamed")
            path = folder / safe_name(name, kind, mark)
            await asyncio.to_thread(part.replace, path)
            taking.finished += written
        finally:
            taking.running -= written
            await asyncio.to_thread(part.unlink, True)
        state = await asyncio.to_thread(path.stat)
        return FileView(
            name=path.name,
            path=f"{self._folder.kind}/{tenant}/{path.name}",
            bytes=state.st_size,
            modified_ns=state.st_mtime_ns,
        )

    async def _kept(self, tenant: str, taking: _Taking) -> int:
        """The bytes of the tenant's files but for those ``finished`` counts; one that ends meanwhile may count twice."""
        finished = taking.finished
        return (await self._folder.list(tenant)).bytes - finished


async def in_time(body: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The body's pieces. Raises SlowError when the next one does not come."""
    while True:
        try:
            async with asyncio.timeout(PIECE_S):
                piece = await anext(body, None)
        except TimeoutError:
            raise SlowError(f"nothing came for {PIECE_S:g} s: send the file again") from None
        if piece is None:
            return
        yield piece
