"""Which processes make a Rheocast on one machine, and with which environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from shared.reproducible import reproducible_mkl


@dataclass(frozen=True, slots=True)
class ProcessSpec:
    """One service process: ``python -m <module>`` with ``env`` on top of the common environment."""

    name: str
    module: str
    env: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Topology:
    """What to start. ``file_roots`` are the folders that ingest may read and egress may write."""

    model: str
    stages: int
    read_roots: tuple[Path, ...]
    write_roots: tuple[Path, ...]
    gateway_port: int | None = None
    batch_log: Path | None = None
    models_dir: Path | None = None
    extra_env: Mapping[str, str] = field(default_factory=dict)
    pipelines: int = 1  # each with its own workers


def usable_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def worker_threads(workers: int, cores: int) -> int:
    """Torch threads per worker: two torch processes with more threads than cores run many times slower (rule 12)."""
    return max(1, cores // workers)


def processes(topology: Topology) -> list[ProcessSpec]:
    """The services in start order. Encode and stage 0 share a worker, as do the last stage and decode."""
    read = os.pathsep.join(str(root) for root in topology.read_roots)
    write = os.pathsep.join(str(root) for root in topology.write_roots)
    common = {
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "RHEOCAST_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",  # threads that spin at a barrier starve the other services of the cores
        "GOMP_SPINCOUNT": "2000",  # … but for 20 µs: most barriers are shorter than falling asleep and waking up
    }
    if topology.models_dir is not None:
        common["RHEOCAST_MODELS_DIR"] = str(topology.models_dir)
    workers = topology.pipelines * topology.stages
    threads = str(worker_threads(workers, usable_cores()))
    specs: list[ProcessSpec] = []
    for index in range(workers):
        pipeline, stage = divmod(index, topology.stages)
        roles = ["stage"]
        if stage == 0:
            roles += ["text", "encode"]
        if stage == topology.stages - 1:
            roles += ["decode"]
        env = {
            "RHEOCAST_INSTANCE": f"worker-{index}",
            "RHEOCAST_PIPELINE": f"p{pipeline}",
            "RHEOCAST_ROLES": ",".join(roles),
            "RHEOCAST_MODEL": topology.model,
            "RHEOCAST_STAGE": str(stage),
            "RHEOCAST_STAGES": str(topology.stages),
            "RHEOCAST_THREADS": threads,
            "OMP_NUM_THREADS": threads,
            "MKL_CBWR": reproducible_mkl(),
        }
        specs.append(ProcessSpec(f"worker-{index}", "services.worker", env))
    scheduler = {"RHEOCAST_INSTANCE": "scheduler-0"}
    if topology.batch_log is not None:
        scheduler["RHEOCAST_BATCH_LOG"] = str(topology.batch_log)
    specs += [
        ProcessSpec("scheduler-0", "services.scheduler", scheduler),
        ProcessSpec("motion-0", "services.motion", {"RHEOCAST_INSTANCE": "motion-0"}),
        ProcessSpec("egress-0", "services.egress", {"RHEOCAST_INSTANCE": "egress-0", "RHEOCAST_FILE_ROOTS": write}),
        ProcessSpec("ingest-0", "services.ingest", {"RHEOCAST_INSTANCE": "ingest-0", "RHEOCAST_FILE_ROOTS": read}),
    ]
    if topology.gateway_port is not None:
        gateway = {"RHEOCAST_INSTANCE": "gateway-0", "RHEOCAST_GATEWAY_PORT": str(topology.gateway_port)}
        specs.append(ProcessSpec("gateway-0", "services.gateway", gateway))
    return [ProcessSpec(spec.name, spec.module, {**common, **topology.extra_env, **spec.env}) for spec in specs]
