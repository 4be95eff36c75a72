"""Pure decisions of the gateway: what a request may name, and how a session is shown."""

from __future__ import annotations

import secrets
from collections.abc import Collection, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from pydantic import Field, ValidationError

from services.gateway.problems import GatewayError
from shared.contracts.commands import FileSource, Mp4Sink, PromptPart, StreamSpec
from shared.contracts.events import LedgerTotals, StreamStats
from shared.contracts.refs import Wire
from shared.contracts.sinks import RtmpSink, Sink
from shared.contracts.sources import UrlSource
from shared.contracts.tiers import DEFAULT_TENANT, Promise, Quality, Tier
from shared.contracts.views import StreamView
from shared.media.addresses import AddressError, AddressRules, check_url

Shown = TypeVar("Shown", bound=Wire)

PULL_SCHEMES = ("rtmp", "rtmps", "rtsp", "rtsps", "http", "https")
PUSH_SCHEMES = ("rtmp", "rtmps")
UPLOADS, RECORDINGS, HLS = "uploads", "recordings", "hls"
MAX_NAME_BYTES = 200  # file systems take 255; services add endings
TENANTS_OWN = (UPLOADS, RECORDINGS)
"""Folders in the media folder that have one folder for each tenant."""


class PathRefusedError(GatewayError):
    """A path that does not stay in the media folder; the message is for the client."""

    status, title = 422, "Path refused"


class StreamCreate(StreamSpec):
    """Body of ``POST /v1/streams``: a stream's spec and, optionally, its id. Paths are relative to the media folder."""

    id: str | None = Field(default=None, pattern=r"^[A-Za-z0-9_-]{1,64}$")


def sum_of(one: LedgerTotals, other: LedgerTotals) -> LedgerTotals:
    """Two ledgers in one."""
    return one.plus(other)


def inside(media_dir: Path, name: str) -> Path:
    """The absolute path of ``name`` in the media folder. Raises PathRefusedError when it would leave it."""
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or "\\" in name or "\0" in name:
        raise PathRefusedError(f"{name!r} will not do: name a file inside the media folder, e.g. 'clips/in.mp4'")
    if any(len(part.encode()) > MAX_NAME_BYTES for part in pure.parts):
        raise PathRefusedError(
            f"a name in {name[:40]!r}… is too long: a file's name has at most {MAX_NAME_BYTES} bytes"
        )
    root = media_dir.resolve()
    path = (root / pure).resolve()
    if not path.is_relative_to(root):
        raise PathRefusedError(f"{name!r} leads out of the media folder")
    return path


def check_address(url: str, schemes: Collection[str], rules: AddressRules) -> None:
    """Raises PathRefusedError unless ``url`` has one of ``schemes`` and leads to no private network, as far as its text tells.

    Ingest and egress ask the name service and check again before every opening: a name may point elsewhere by then.
    """
    try:
        check_url(url, schemes, rules)
    except AddressError as error:
        raise PathRefusedError(f"url: {error}") from None


def readable(media_dir: Path, name: str, tenant: str) -> Path:
    """As :func:`inside`, for a file that is read: what another tenant has uploaded or recorded is not there."""
    path = inside(media_dir, name)
    parts = path.relative_to(media_dir.resolve()).parts
    if len(parts) > 1 and parts[0] in TENANTS_OWN and parts[1] != tenant:
        raise PathRefusedError(f"{name!r} is not yours: your files are in {parts[0]}/{tenant}/")
    return path


def writable(media_dir: Path, name: str, tenant: str, anywhere: bool) -> Path:
    """As :func:`inside`, for a file that is written: in the tenant's recordings, or anywhere that holds nobody's own."""
    path = inside(media_dir, name)
    parts = path.relative_to(media_dir.resolve()).parts
    own = len(parts) > 2 and parts[:2] == (RECORDINGS, tenant)
    if not own and (not anywhere or (parts and parts[0] in (*TENANTS_OWN, HLS))):
        raise PathRefusedError(
            f"{name!r} will not do: recordings go to {RECORDINGS}/{tenant}/, e.g. '{RECORDINGS}/{tenant}/out.mp4'"
        )
    return path


def sink_of_request(
    sink: Sink, media_dir: Path, tenant: str, anywhere: bool, rules: AddressRules = AddressRules()
) -> Sink:
    """A sink as egress gets it. Raises PathRefusedError."""
    if isinstance(sink, RtmpSink):
        check_address(sink.url, PUSH_SCHEMES, rules)
    if not isinstance(sink, Mp4Sink):
        return sink
    return sink.model_copy(update={"path": str(writable(media_dir, sink.path, tenant, anywhere))})


def spec_of_request(
    request: StreamCreate,
    media_dir: Path,
    tenant: str = DEFAULT_TENANT,
    *,
    anywhere: bool = True,
    rules: AddressRules = AddressRules(),
) -> StreamSpec:
    """The spec to start, with paths made absolute inside the media folder; whose it is says the caller, not the body.

    ``anywhere``: recordings may go anywhere in the media folder. Raises PathRefusedError.
    """
    changes: dict[str, Any] = {"tenant": tenant}
    if isinstance(request.source, FileSource):
        path = readable(media_dir, request.source.path, tenant)
        changes["source"] = request.source.model_copy(update={"path": str(path)})
    if isinstance(request.source, UrlSource):
        check_address(request.source.url, PULL_SCHEMES, rules)
    changes["sinks"] = tuple(sink_of_request(sink, media_dir, tenant, anywhere, rules) for sink in request.sinks)
    fields = {name: getattr(request, name) for name in StreamSpec.model_fields}
    return StreamSpec.model_validate({**fields, **changes})


def new_stream_id() -> str:
    """An id nobody has guessed."""
    return f"s-{secrets.token_hex(6)}"


def view_of(stream: str, session: Mapping[str, Any], ledger: LedgerTotals) -> StreamView:
    """A session from the store, shown."""
    spec: StreamSpec = StreamSpec.model_validate(session["spec"])
    assignment: Mapping[str, Any] = session.get("assignment") or {}
    now: Mapping[str, Any] = session.get("settings") or {}
    tier: Mapping[str, Any] = session.get("tier") or {}
    promise: Mapping[str, Any] = session.get("promise") or {}
    return StreamView(
        id=stream,
        state=str(session.get("state", "unknown")),
        prompt=str(session.get("prompt", spec.prompt)),
        prompt_version=int(session.get("prompt_version", 0)),
        prompts=tuple(PromptPart.model_validate(part) for part in session.get("prompts") or ()),
        model=spec.model,
        mode=spec.mode.value,
        source_kind=spec.source.kind,
        fps=now.get("fps", spec.fps),
        width=assignment.get("width", spec.width),
        height=assignment.get("height", spec.height),
        steps=now.get("steps", spec.steps),
        seed=now.get("seed", spec.seed),
        noise=now.get("noise", spec.noise),
        frames_per_block=now.get("frames_per_block", spec.frames_per_block),
        paused=now.get("paused", False),
        ledger=ledger,
        reason=str(session.get("reason", "")),
        tenant=spec.tenant,
        quality=Quality(now.get("quality", spec.quality)),
        promise=_part(Promise, session.get("promise")),
        tier=_part(Tier, tier.get("tier") or promise.get("tier")),
        tier_reason=str(tier.get("reason", "")),
        stats=_part(StreamStats, session.get("stats")),
    )


def _part(kind: type[Shown], stored: Any) -> Shown | None:
    """A part of a session that a newer or older service may have written otherwise: shown when it can be read."""
    try:
        return None if stored is None else kind.model_validate(stored)
    except ValidationError:
        return None
