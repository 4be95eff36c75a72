"""Heartbeats: who is there, what it is doing, and what its work costs."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from shared.contracts.refs import Wire


class MeasuredCost(Wire):
    """A role's forward of this shape took ``ms`` milliseconds of device time (the median of ``runs``).

    ``role`` is encode, stage or decode; ``items`` share the forward, of ``units`` latent tokens in all.
    """

    role: str
    items: int
    units: int
    ms: float
    runs: int = 1


class Beat(Wire):
    """every service instance → scheduler (``rheo.worker.<id>.beat``), twice a second.

    ``incarnation`` is new for every process start: a known instance with a new incarnation came back empty.
    ``busy`` is the share of the last interval spent computing. ``stream_bytes`` is the device memory that each stream holds,
    ``suspended`` the host memory of those that were moved there. ``memory_free``: bytes of the device that new slots may take.
    A worker with a stage has DiT blocks ``first_block``…``last_block`` (−1: none); ``generation`` is the newest that it knows.
    ``device`` names what a worker computes with, settings that change its speed included; ``calibration`` is what its roles
    took at the start, ``measured`` what decode took since the last beat (of
    stages and encode the messages themselves tell).

    What a worker computes, and what else is done on its machine, in seconds since whenever, of which differences count:
    ``host`` names the ``cores`` that it shares with other processes, ``host_busy_s`` are the CPU seconds that were used of
    them, ``compute_s`` those of the worker's own forwards, ``thread_s`` the time that these had threads of the cores, added
    up over threads. ``threads`` is how many a *wide* forward has; others have one, and two of those (one of the blocks, one of
    the autoencoder) may run at once. ``wide_from``: by role, the latent tokens of an item from which on it is wide. A GPU has
    0 threads.
    """

    kind: Literal["beat"] = "beat"
    service: str
    instance: str
    incarnation: str
    roles: tuple[str, ...] = ()
    pipeline: str = ""
    stage: int = -1
    stages: int = 0
    model: str = ""
    ready: bool = True
    busy: float = 0.0
    memory_free: int = 0
    streams: tuple[str, ...] = ()
    role_ms: dict[str, float] = Field(default_factory=dict[str, float])  # measured milliseconds per chunk, by role
    stream_bytes: dict[str, int] = Field(default_factory=dict[str, int])
    device: str = ""
    calibration: tuple[MeasuredCost, ...] = ()
    measured: tuple[MeasuredCost, ...] = ()
    suspended: dict[str, int] = Field(default_factory=dict[str, int])
    first_block: int = -1
    last_block: int = -1
    generation: int = 0
    host: str = ""
    cores: float = 0.0
    host_busy_s: float = 0.0
    compute_s: float = 0.0
    thread_s: float = 0.0
    threads: int = 0
    wide_from: dict[str, int] = Field(default_factory=dict[str, int])
