"""Scope's protocol: what its clients send and are told, in this system's words. Decisions only; the routes are in
``api/scope.py``.

A client sends one offer for both ways and gets a stream of its own. A session's id is the stream's and the peer's.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from services.gateway.core import new_stream_id
from services.gateway.demo import DEFAULT_PROMPT
from services.gateway.errors import InvalidError, UnknownPartError
from shared.contracts.commands import MAX_SIDE, StreamPatch, StreamSpec
from shared.contracts.signalling import MAX_SDP_CHARS
from shared.contracts.sinks import WhepSink
from shared.contracts.sources import NoSource, PushSource
from shared.rtc.fragments import MAX_CANDIDATES
from shared.rtc.scope_parameters import Parameters, ParametersError, changes_of

DEFAULT_STEPS = 2
_SESSION = re.compile(r"([A-Za-z0-9_-]{1,64})\.([A-Za-z0-9_-]{1,64})")

ModelId = str


class Offer(BaseModel):
    """Body of an offer."""

    model_config = ConfigDict(extra="ignore")

    # What is no SDP at all is refused before a stream is started for it.
    sdp: str = Field(min_length=1, max_length=MAX_SDP_CHARS, pattern=r"^v=0\b")
    type: Literal["offer"] = "offer"
    initialParameters: Parameters | None = None


class Answer(BaseModel):
    """The answer to an offer."""

    sdp: str
    type: Literal["answer"] = "answer"
    sessionId: str


class Candidate(BaseModel):
    """One candidate of a browser's; an empty one ends them."""

    candidate: str = Field(max_length=1000, pattern=r"^[^\r\n]*$")
    sdpMid: str | None = Field(default=None, max_length=64, pattern=r"^[^\s]*$")
    sdpMLineIndex: int | None = Field(default=None, ge=0, le=64)


class Candidates(BaseModel):
    """Body of a trickling PATCH."""

    candidates: list[Candidate] = Field(max_length=MAX_CANDIDATES)


class LoadParams(BaseModel):
    """What counts of a load's parameters: the size and the seed of the streams that follow."""

    model_config = ConfigDict(extra="ignore")

    width: int | None = Field(default=None, ge=16, le=MAX_SIDE)
    height: int | None = Field(default=None, ge=16, le=MAX_SIDE)
    base_seed: int | None = Field(default=None, ge=0, lt=2**63)
    seed: int | None = Field(default=None, ge=0, lt=2**63)


class LoadItem(BaseModel):
    """One pipeline of a chain or graph."""

    pipeline_id: ModelId = Field(min_length=1, max_length=128)
    load_params: LoadParams | None = None


class Load(BaseModel):
    """Body of a load. Of a chain the last pipeline counts: those before it prepare the video."""

    model_config = ConfigDict(extra="ignore")

    pipelines: list[LoadItem] | None = Field(default=None, max_length=64)
    pipeline_ids: list[ModelId] | None = Field(default=None, max_length=64)
    load_params: LoadParams | None = None


class Loaded(BaseModel):
    """What a client has asked to be loaded: it holds for the streams that it starts."""

    pipeline_ids: list[ModelId] = Field(default_factory=list[str])
    params: LoadParams = Field(default_factory=LoadParams)


def loaded_by(load: Load) -> Loaded:
    """What a load asks for. Raises InvalidError when it names no pipeline."""
    if load.pipelines:
        params = next((item.load_params for item in reversed(load.pipelines) if item.load_params), None)
        return Loaded(pipeline_ids=[item.pipeline_id for item in load.pipelines], params=params or LoadParams())
    if load.pipeline_ids:
        return Loaded(pipeline_ids=load.pipeline_ids, params=load.load_params or LoadParams())
    raise InvalidError('name what to load, e.g. {"pipeline_ids": ["rheo-tiny"]}')


@dataclass(frozen=True, slots=True)
class Choice:
    """What the server has a say in. ``served``: the models of which a pipeline runs (None: nobody says); ``default``: of
    clients who name none of them. A stream ends ``grace_s`` after its client has left: who comes back offers anew.
    """

    default: str
    served: frozenset[str] | None
    grace_s: float = 2.0

    def model(self, ids: Sequence[ModelId]) -> str:
        """What serves these pipelines: the last one that is a model here, else the default, else whatever there is."""
        served = self.served or frozenset[str]()
        named = next((name for name in reversed(ids) if name in served), None)
        if named is not None or not served or self.default in served:
            return named or self.default
        return min(served)


def stream_of(offer: Offer, loaded: Loaded, choice: Choice, tenant: str) -> tuple[str, StreamSpec]:
    """A new stream for an offer. Raises InvalidError, ValidationError."""
    asked, params = offer.initialParameters or Parameters(), loaded.params
    changes = changes_asked(asked)
    prompts: Sequence[dict[str, Any]] = changes.get("prompts", ())
    heaviest = max(prompts, key=lambda part: part["weight"])["text"] if prompts else None
    seed = next((s for s in (changes.get("seed"), params.base_seed, params.seed) if s is not None), 0)
    sized = params.width is not None and params.height is not None
    spec = StreamSpec(
        source=PushSource(idle_s=0) if asked.wants_video else NoSource(),
        sinks=(WhepSink(),),
        prompt=changes.get("prompt") or heaviest or DEFAULT_PROMPT,
        model=choice.model(asked.pipeline_ids or loaded.pipeline_ids),
        width=_even(params.width) if sized else None,
        height=_even(params.height) if sized else None,
        steps=changes.get("steps", DEFAULT_STEPS),
        noise=changes.get("noise"),
        seed=seed,
        tenant=tenant,
        audio=False,
        peer_grace_s=choice.grace_s,
    )
    return new_stream_id().replace("s-", "scope-", 1), spec


def patches_of(offer: Offer) -> list[StreamPatch]:
    """What an offer asks for beside what a stream can be started with: a mix of prompts, and a pause."""
    asked = offer.initialParameters or Parameters()
    patches: list[StreamPatch] = []
    if prompts := changes_asked(asked).get("prompts"):
        patches.append(StreamPatch.model_validate({"prompts": prompts}))
    if asked.paused:
        patches.append(StreamPatch(paused=True))
    return patches


def changes_asked(asked: Parameters) -> dict[str, Any]:
    """As ``changes_of``. Raises InvalidError."""
    try:
        return changes_of(asked)
    except ParametersError as error:
        raise InvalidError(f"initialParameters: {error}") from None


def session_id(stream: str, peer: str) -> str:
    """What a client calls its session."""
    return f"{stream}.{peer}"


def session_of(session: str) -> tuple[str, str]:
    """(stream, peer). Raises UnknownPartError."""
    found = _SESSION.fullmatch(session)
    if found is None:
        raise UnknownPartError("there is no such session: offer again")
    return found.group(1), found.group(2)


def fragment_of(candidates: Candidates) -> str:
    """Candidates as the fragment that egress reads; empty for none."""
    lines: list[str] = []
    for each in candidates.candidates:
        if not each.candidate.strip():
            lines.append("a=end-of-candidates")
            continue
        lines.append("m=video 9 UDP/TLS/RTP/SAVPF 0")
        if each.sdpMid:
            lines.append(f"a=mid:{each.sdpMid}")
        lines.append(f"a={each.candidate.strip().removeprefix('a=')}")
    return "".join(f"{line}\r\n" for line in lines)


def status_page(loaded: Loaded, choice: Choice) -> dict[str, Any]:
    """What a client polls until it reads ``loaded``. It is told the name that it asked for."""
    model = choice.model(loaded.pipeline_ids)
    status, error = "loaded", None
    if choice.served is None:
        status = "loading"
    elif model not in choice.served:
        status, error = "error", f"no worker has the model {model}: start one, or set RHEOCAST_DEMO_MODEL"
    return {
        "status": status,
        "pipeline_id": loaded.pipeline_ids[-1] if loaded.pipeline_ids else model,
        "load_params": loaded.params.model_dump(exclude_none=True),
        "loaded_lora_adapters": [],
        "error": error,
        "loading_stage": "waiting for the scheduler" if status == "loading" else None,
        "produces_video": True,
        "produces_audio": False,
    }


def schema_of(model: str, version: str) -> dict[str, Any]:
    """A model as a pipeline with what can be set here."""
    return {
        "id": model,
        "name": f"Rheocast ({model})",
        "description": "A causal video-diffusion model, served to many streams.",
        "version": version,
        "docs_url": None,
        "estimated_vram_gb": None,
        "requires_models": False,
        "supports_lora": False,
        "supports_vace": False,
        "usage": [],
        "config_schema": {"type": "object", "properties": {}},
        "supported_modes": ["video", "text"],
        "default_mode": "video",
        "supports_prompts": True,
        "default_temporal_interpolation_method": "linear",
        "default_temporal_interpolation_steps": 0,
        "default_spatial_interpolation_method": "linear",
        "supports_cache_management": True,
        "supports_kv_cache_bias": False,
        "supports_quantization": False,
        "min_dimension": 16,
        "recommended_quantization_vram_threshold": None,
        "modified": False,
        "plugin_name": None,
    }


def _even(side: int | None) -> int:
    """A multiple of 16."""
    return max(16, (side or 16) // 16 * 16)
