"""Subject names. The only place that spells them."""

from __future__ import annotations

import re

_TOKEN = re.compile(r"[A-Za-z0-9_-]{1,64}")
ANY = "*"

TAKEN = "rheo.taken"
MOVED = "rheo.moved"
FLEET = "rheo.fleet"
TEXT_ENCODE = "rheo.text.encode"
CAPACITY = "rheo.scheduler.capacity"


def _token(value: str) -> str:
    """A safe subject token: no dots, wildcards or spaces may come from outside."""
    if value != ANY and not _TOKEN.fullmatch(value):
        raise ValueError(f"{value!r} cannot be part of a subject: use 1–64 letters, digits, '-' or '_'")
    return value


def is_token(value: str) -> bool:
    """Whether ``value`` may be a stream, worker or pipeline id."""
    return _TOKEN.fullmatch(value) is not None


def stream(stream_id: str, leaf: str) -> str:
    """``rheo.stream.<id>.<leaf>``: push, chunk, audio, latents, motion, denoised, frames, closed, out, control, event."""
    return f"rheo.stream.{_token(stream_id)}.{_token(leaf)}"


def pipeline_stage(pipeline: str, stage: int | str) -> str:
    """``rheo.pipeline.<p>.stage.<k>``: batches on their way into stage k."""
    return f"rheo.pipeline.{_token(pipeline)}.stage.{_token(str(stage))}"


def pipeline_done(pipeline: str) -> str:
    """``rheo.pipeline.<p>.done``: what the stages report to the scheduler."""
    return f"rheo.pipeline.{_token(pipeline)}.done"


def assign(service: str) -> str:
    """``rheo.<service>.assign``: take or leave a stream."""
    return f"rheo.{_token(service)}.assign"


def beat(instance: str) -> str:
    """``rheo.worker.<id>.beat``: heartbeats of every instance."""
    return f"rheo.worker.{_token(instance)}.beat"


def tensor_get(owner: str) -> str:
    """``rheo.tensor.<owner>.get``: fetch a tensor from another host, in parts."""
    return f"rheo.tensor.{_token(owner)}.get"


def stream_of(subject: str) -> str:
    """The stream id in ``rheo.stream.<id>.…``."""
    parts = subject.split(".")
    if len(parts) < 4 or parts[:2] != ["rheo", "stream"]:
        raise ValueError(f"{subject!r} is not a stream's subject")
    return parts[2]
