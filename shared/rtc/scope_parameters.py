"""What a client of Scope's protocol asks for, with the offer and over its data channel, in this system's words. Pure."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from shared.contracts.commands import MAX_PROMPT_CHARS, MAX_PROMPT_PARTS, StreamPatch

MAX_MESSAGE_BYTES = 64 * 1024
MAX_STEPS = 4
MAX_BLEND = 64
PROMPT_FIELDS = ("prompt", "prompts", "blend_chunks", "recache")
NOT_SERVED = (
    "first_frame_image",
    "graph",
    "images",
    "input_source",
    "kv_cache_attention_bias",
    "last_frame_image",
    "lora_scales",
    "modulations",
    "output_sinks",
    "recording",
    "vace_ref_images",
)
"""Parameters of Scope's that change nothing here; a client that sends one is told once."""


class ParametersError(ValueError):
    """A message that cannot be carried out. The message is one line."""


class PromptItem(BaseModel):
    """One prompt; a weight of 0 leaves it out."""

    text: str = Field(max_length=MAX_PROMPT_CHARS)
    weight: float = Field(default=1.0, ge=0.0, le=100.0, allow_inf_nan=False)


Prompts = list[PromptItem | str]


class Transition(BaseModel):
    """Fade to other prompts, over so many chunks."""

    target_prompts: Prompts = Field(max_length=64)
    num_steps: int = Field(default=4, ge=0)


class Parameters(BaseModel):
    """Those of which we know what they mean. Others are kept, to be told apart from a slip of the pen."""

    model_config = ConfigDict(extra="allow")

    input_mode: Literal["text", "video"] | None = None
    prompts: Prompts | None = Field(default=None, max_length=64)
    transition: Transition | None = None
    noise_scale: float | None = Field(default=None, ge=0.0, le=1.0)
    denoising_step_list: list[float] | None = Field(default=None, min_length=1, max_length=64)
    base_seed: int | None = Field(default=None, ge=0, lt=2**63)
    manage_cache: bool | None = None
    reset_cache: bool | None = None
    paused: bool | None = None
    pipeline_ids: list[str] | None = Field(default=None, max_length=64)

    @property
    def not_served(self) -> list[str]:
        """The names of what was asked for and changes nothing here."""
        return [name for name in NOT_SERVED if (self.model_extra or {}).get(name)]

    @property
    def wants_video(self) -> bool:
        """Whether the client's own video is to be restyled; else the prompt alone makes the picture."""
        if self.input_mode is not None:
            return self.input_mode == "video"
        graph = (self.model_extra or {}).get("graph")
        nodes = graph.get("nodes") if isinstance(graph, dict) else None
        return any(isinstance(node, dict) and node.get("type") == "source" for node in nodes or ())


def read_message(message: str | bytes) -> Parameters:
    """A message of the data channel. Raises ParametersError."""
    if len(message) > MAX_MESSAGE_BYTES:
        raise ParametersError(f"a message has at most {MAX_MESSAGE_BYTES} bytes")
    try:
        raw: Any = json.loads(message)
    except (ValueError, RecursionError):
        raise ParametersError("a message is JSON") from None
    if not isinstance(raw, dict):
        raise ParametersError('a message is a JSON object, e.g. {"noise_scale": 0.7}')
    try:
        return Parameters.model_validate(raw)
    except ValidationError as error:
        raise ParametersError(_first(error)) from None


def changes_of(parameters: Parameters, *, recache: bool = False) -> dict[str, Any]:
    """The fields of a StreamPatch that they ask for, without ``paused``. Raises ParametersError.

    ``recache``: what is cached is made anew with a new prompt.
    """
    found: dict[str, Any] = {}
    fading = parameters.transition
    items = fading.target_prompts if fading is not None else parameters.prompts
    if items is not None and (parts := _parts(items)):
        if len(parts) == 1:
            found["prompt"] = parts[0]["text"]
        else:
            found["prompts"] = parts
        if fading is not None:
            found["blend_chunks"] = min(MAX_BLEND, fading.num_steps)
        if recache:
            found["recache"] = True
    if parameters.denoising_step_list is not None:
        found["steps"] = min(MAX_STEPS, len(parameters.denoising_step_list))
    if parameters.noise_scale is not None:
        found["noise"] = parameters.noise_scale
    if parameters.base_seed is not None:
        found["seed"] = parameters.base_seed
    if parameters.reset_cache:
        found["reset"] = True
    try:
        StreamPatch.model_validate(found)
    except ValidationError as error:
        raise ParametersError(_first(error)) from None
    return found


@dataclass(slots=True)
class Wanted:
    """What a client asked for and has not been sent on. Bounded: what is newer takes the older one's place (``replaced``)."""

    recache: bool = False
    paused: bool | None = None
    changes: dict[str, Any] = field(default_factory=dict[str, Any])
    replaced: int = 0

    def add(self, parameters: Parameters) -> None:
        """One message more. Raises ParametersError, and nothing of the message counts."""
        recache = self.recache if parameters.manage_cache is None else parameters.manage_cache
        new = changes_of(parameters, recache=recache)
        self.recache = recache
        gone = {*new, *(PROMPT_FIELDS if "prompt" in new or "prompts" in new else ())} & self.changes.keys()
        self.replaced += len(gone)
        self.changes = {name: value for name, value in self.changes.items() if name not in gone} | new
        if parameters.paused is not None:
            self.replaced += self.paused is not None
            self.paused = parameters.paused

    def take(self) -> list[StreamPatch]:
        """The patches to send, in order; nothing is wanted then. What is new comes before the stream goes on."""
        patches = [StreamPatch.model_validate(self.changes)] if self.changes else []
        if self.paused is not None:
            patches.append(StreamPatch(paused=self.paused))
        self.changes, self.paused = {}, None
        return patches


def _parts(items: Prompts) -> list[dict[str, Any]]:
    """Prompts that count, as parts of a mix. Raises ParametersError."""
    whole = [PromptItem(text=item) if isinstance(item, str) else item for item in items]
    parts = [{"text": item.text, "weight": item.weight} for item in whole if item.weight > 0 and item.text.strip()]
    if len(parts) > MAX_PROMPT_PARTS:
        raise ParametersError(f"prompts: {len(parts)} at once are too many: give {MAX_PROMPT_PARTS} at most")
    return parts


def _first(error: ValidationError) -> str:
    told = error.errors(include_url=False, include_input=False)[0]
    place = ".".join(str(part) for part in told["loc"])[:80]
    return f"{place}: {told['msg']}" if place else str(told["msg"])
