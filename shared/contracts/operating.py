"""What an operator asks of the scheduler: move a stream, empty a worker, cut a pipeline anew, and see how things stand.

A stream is moved by a command on ``rheo.stream.<id>.control``, answered like any other. The rest is asked on ``rheo.fleet``
(request/reply) of the scheduler that leads.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Literal

from pydantic import Field

from shared.contracts.refs import Wire


class MigrateStream(Wire):
    """gateway or platform → scheduler (``.control``): go on with this stream on another pipeline, pixel for pixel.

    Answered by accepted or refused, then by migrated{chunk}, or by a warning with this command when it stayed where it was.
    ``pipeline`` empty: the scheduler chooses.
    """

    kind: Literal["migrate"] = "migrate"
    command: str
    stream: str
    pipeline: str = Field(default="", max_length=64)


class WorkerState(StrEnum):
    """What a worker may be used for."""

    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"  # takes no stream; those of its pipeline are being moved away
    DRAINED = "drained"  # nothing is on it: it may be stopped
    LOST = "lost"  # its heartbeats are missing


class Refused(StrEnum):
    """Why a request was not carried out."""

    UNKNOWN = "unknown"
    INVALID = "invalid"
    CONFLICT = "conflict"
    NOT_NOW = "not_now"  # the same request may succeed later


class WorkerView(Wire):
    """One worker as the scheduler sees it. ``blocks`` are its DiT blocks [first, last], empty when it told none."""

    instance: str
    state: WorkerState
    pipeline: str = ""
    stage: int = -1
    roles: tuple[str, ...] = ()
    model: str = ""
    blocks: tuple[int, ...] = ()
    streams: tuple[str, ...] = ()
    busy: float = 0.0
    memory_free: int = 0
    role_ms: dict[str, float] = Field(default_factory=dict[str, float])
    stuck: dict[str, str] = Field(default_factory=dict[str, str])  # draining: stream → why it cannot be moved yet


class PipelineView(Wire):
    """One pipeline. ``cuts`` are the first DiT blocks of its stages 1…S−1.

    ``stage_busy``: the share of the last seconds that each stage computed, encode and decode included; empty while too little
    was measured. ``load`` is the largest of them. ``moving`` is what re-balancing is at; ``last_move`` how the last one ended.
    """

    name: str
    model: str
    workers: tuple[str, ...]
    draining: bool = False
    layers: int = 0
    cuts: tuple[int, ...] = ()
    generation: int = 0
    streams: tuple[str, ...] = ()
    load: float = 0.0
    stage_busy: tuple[float, ...] = ()
    moving: str = "idle"
    last_move: str = ""


class FleetAsked(Wire):
    """gateway or platform → scheduler (``rheo.fleet``): who is there. Answered by FleetTold.

    ``worker``: of this one and its pipeline only; empty: of all.
    """

    kind: Literal["fleet_asked"] = "fleet_asked"
    worker: str = ""


class FleetTold(Wire):
    """Reply to FleetAsked, DrainWorker and CutPipeline: how things stand now; ``error`` is one line when it was refused.

    ``retry_after_s`` above 0: the same request may be carried out then.
    """

    kind: Literal["fleet_told"] = "fleet_told"
    workers: tuple[WorkerView, ...] = ()
    pipelines: tuple[PipelineView, ...] = ()
    error: str | None = None
    refused: Refused | None = None
    retry_after_s: float = 0.0


class DrainWorker(Wire):
    """gateway or platform → scheduler (``rheo.fleet``): empty this worker, so that it can be stopped. Answered by FleetTold.

    Its pipeline takes no stream from then on, and what runs there is moved to others as they have room. ``force`` stops what
    cannot be moved now. ``undo`` takes it all back: the worker may be used again.
    """

    kind: Literal["drain_worker"] = "drain_worker"
    worker: str
    force: bool = False
    undo: bool = False


class CutPipeline(Wire):
    """gateway or platform → scheduler (``rheo.fleet``): split the DiT blocks of a pipeline here, streams going on.

    ``cuts``: the first block of stage 1, 2, …; empty: where the measured costs say. Answered when it is done or refused.
    """

    kind: Literal["cut_pipeline"] = "cut_pipeline"
    pipeline: str
    cuts: tuple[int, ...] = Field(default=(), max_length=64)
