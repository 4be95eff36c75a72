"""Tiers, promises and capacity: how well a stream runs, what was promised to it, and how many more fit."""

from __future__ import annotations

from enum import StrEnum
from typing import Literal

from pydantic import Field

from shared.contracts.refs import Wire

TENANT_PATTERN = r"^[A-Za-z0-9_-]{1,64}$"
DEFAULT_TENANT = "default"


class Quality(StrEnum):
    """What a stream gives up first under load: nothing in particular, its picture, or (last of all) its picture."""

    BALANCED = "balanced"
    LOWEST_LATENCY = "lowest_latency"
    BEST_PICTURE = "best_picture"


class Refusal(StrEnum):
    """Why a command was refused, for whoever has to act on it; ``reason`` says it in words."""

    OTHER = ""
    QUOTA = "quota"  # the tenant has what it may have, or asks too often
    CAPACITY = "capacity"  # nothing is free
    NOT_READY = "not_ready"  # something is still starting
    UNKNOWN = "unknown"  # what the command names is not there


class Tier(Wire):
    """How well a stream runs. ``fps`` 0: the source's own rate, which nobody knows yet."""

    steps: int
    fps: float
    width: int
    height: int
    frames_per_block: int = 1  # T


class Promise(Wire):
    """What an admitted stream may count on: frames a second, and milliseconds from a frame's capture to its output."""

    fps: float
    latency_ms: float
    tier: Tier


class PaceStream(Wire):
    """scheduler → ingest: take at most ``fps`` frames a second of the source from now on; 0: all of them.

    The newest ``version`` holds; an older or repeated one changes nothing. Frames left out are counted as dropped, "rate".
    """

    kind: Literal["pace"] = "pace"
    instance: str
    stream: str
    epoch: int
    version: int
    fps: float = 0.0


class CapacityAsked(Wire):
    """gateway → the leading scheduler (``rheo.scheduler.capacity``, request/reply): how many more streams fit?

    None: the model's or the spec's default. The answer has the tier that was asked for, and those below it.
    """

    kind: Literal["capacity_asked"] = "capacity_asked"
    model: str = "rheo-tiny"
    width: int | None = None
    height: int | None = None
    fps: float | None = None
    steps: int | None = None
    frames_per_block: int | None = None
    deadline_ms: int = 600
    tenant: str = DEFAULT_TENANT  # who would start them: quotas and fair turns count


class TierCapacity(Wire):
    """So many more streams of this tier would be admitted now, each with this latency; ``load`` is what one would take."""

    tier: Tier
    more: int
    latency_ms: float = 0.0
    load: float = 0.0


class CapacityTold(Wire):
    """Reply to CapacityAsked. ``load`` of ``target`` is in use, over the pipelines of the model.

    ``known``: the figures come from measured costs; else streams are admitted one after the other until they are known.
    """

    kind: Literal["capacity_told"] = "capacity_told"
    model: str = ""
    streams: int = 0
    pipelines: int = 0
    load: float = 0.0
    target: float = 0.0
    known: bool = False
    tiers: tuple[TierCapacity, ...] = Field(default=(), max_length=64)
    error: str | None = None
    refusal: Refusal = Refusal.OTHER
    retry_after_s: float = 0.0
