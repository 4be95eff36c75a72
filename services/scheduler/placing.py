"""Where a new stream goes: which pipeline, ingest, egress and motion. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from services.scheduler.fleet import Fleet, Pipeline
from services.scheduler.messenger import RefusedError
from services.scheduler.records import Phase, StreamRecord
from shared.contracts.commands import StartStream
from shared.engine.plan.registry import model_spec
from shared.engine.plan.spec import SpecError

NOT_READY_RETRY_S = 2.0
FULL_RETRY_S = 10.0


def place(
    command: StartStream,
    fleet: Fleet,
    records: Mapping[str, StreamRecord],
    max_streams: int,
    models_dir: Path | None = None,
) -> tuple[StreamRecord, Pipeline]:
    """The record of a new stream and its pipeline: the one with the fewest streams. Raises RefusedError with the fix."""
    spec = command.spec
    try:
        model = model_spec(spec.model, models_dir)
    except SpecError as error:
        raise RefusedError(str(error)) from None
    fitting = [pipeline for pipeline in fleet.pipelines() if pipeline.model == spec.model]
    if not fitting:
        raise RefusedError(
            f"no worker is ready for model {spec.model}: wait if it is still starting, "
            f"or start one with RHEOCAST_MODEL={spec.model}",
            NOT_READY_RETRY_S,
        )
    load = {p.name: sum(r.pipeline == p.name and r.phase is not Phase.ENDED for r in records.values()) for p in fitting}
    pipeline = min(fitting, key=lambda p: (load[p.name], p.name))
    if load[pipeline.name] >= max_streams:
        raise RefusedError(
            f"all pipelines are full ({max_streams} streams each); stop one, or add a worker",
            FULL_RETRY_S,
        )
    chosen: dict[str, str] = {}
    for service in ("ingest", "egress", "motion"):
        instance = fleet.pick(service)
        if instance is None:
            raise RefusedError(f"no {service} service is ready yet: try again", NOT_READY_RETRY_S)
        chosen[service] = instance
    return StreamRecord(
        stream=command.stream,
        epoch=0,  # known once the session store has been asked
        spec=spec,
        width=spec.width or model.default_width,
        height=spec.height or model.default_height,
        noise=model.noise.s0 if spec.noise is None else spec.noise,
        pipeline=pipeline.name,
        workers=pipeline.workers,
        ingest=chosen["ingest"],
        egress=chosen["egress"],
        motion=chosen["motion"],
    ), pipeline
