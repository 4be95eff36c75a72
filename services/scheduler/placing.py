"""Where a new stream goes: which pipeline, ingest, egress and motion. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from services.scheduler.fleet import Fleet, Pipeline
from services.scheduler.messenger import RefusedError
from services.scheduler.records import StreamRecord
from shared.contracts.commands import NoSource, StartStream
from shared.contracts.tiers import Refusal
from shared.engine.plan.registry import model_spec
from shared.engine.plan.spec import ModelSpec, SpecError

NOT_READY_RETRY_S = 2.0


def check_settings(
    model: ModelSpec,
    steps: int | None,
    frames_per_block: int | None,
    noise: float | None = None,
    from_text: bool = False,
) -> None:
    """Raises RefusedError, with what would be accepted, for what the model cannot run. None: not asked for."""
    if noise is not None and from_text:
        raise RefusedError("without a source everything is noise already: leave noise out")
    known = len(model.steps_from_text) if from_text else model.max_steps
    if steps is not None and steps > known:
        raise RefusedError(f"{model.name} has {known} denoising steps, not {steps}: give 1…{known}")
    most = model.ring - model.sinks
    if frames_per_block is not None and frames_per_block > most:
        raise RefusedError(
            f"a frame block of {frames_per_block} does not fit beside {model.name}'s {model.sinks} sinks: give 1…{most}"
        )


def place(
    command: StartStream,
    fleet: Fleet,
    admit: Callable[[StreamRecord, ModelSpec, Sequence[Pipeline]], Pipeline],
    models_dir: Path | None = None,
) -> tuple[StreamRecord, Pipeline]:
    """The record of a new stream and its pipeline, which ``admit`` chooses and reserves. Raises RefusedError with the fix."""
    spec = command.spec
    try:
        model = model_spec(spec.model, models_dir)
    except SpecError as error:
        raise RefusedError(str(error)) from None
    longest = max(spec.frames_per_block, spec.max_frames_per_block or 0)
    check_settings(model, spec.steps, longest, spec.noise, isinstance(spec.source, NoSource))
    if isinstance(spec.source, NoSource):
        # Nobody else can say how fast video without a source plays.
        spec = spec.model_copy(update={"fps": spec.fps or float(model.default_fps)})
    fitting = fitting_pipelines(fleet, spec.model)
    chosen: dict[str, str] = {}
    for service in ("ingest", "egress", "motion"):
        instance = fleet.pick(service)
        if instance is None:
            raise RefusedError(f"no {service} service is ready yet: try again", NOT_READY_RETRY_S, Refusal.NOT_READY)
        chosen[service] = instance
    record = StreamRecord(
        stream=command.stream,
        epoch=0,  # known once the session store has been asked
        spec=spec,
        width=spec.width or model.default_width,
        height=spec.height or model.default_height,
        noise=model.noise.s0 if spec.noise is None else spec.noise,
        skip_similar=spec.skip_similar,
        steadying=model.steadying if spec.steadying is None else spec.steadying,
        frames_per_block=longest,
        ingest=chosen["ingest"],
        egress=chosen["egress"],
        motion=chosen["motion"],
    )
    pipeline = admit(record, model, fitting)  # last of all: what it reserves is kept
    record.pipeline, record.workers = pipeline.name, pipeline.workers
    return record, pipeline


def fitting_pipelines(fleet: Fleet, model: str) -> list[Pipeline]:
    """The pipelines that run a model. Raises RefusedError when there is none."""
    fitting = [pipeline for pipeline in fleet.pipelines() if pipeline.model == model]
    if not fitting:
        raise RefusedError(
            f"no worker is ready for model {model}: wait if it is still starting, "
            f"or start one with RHEOCAST_MODEL={model}",
            NOT_READY_RETRY_S,
            Refusal.NOT_READY,
        )
    return fitting
