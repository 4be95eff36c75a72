"""One candidate for a batch, and what is told when a command's change takes effect with it."""

from __future__ import annotations

from dataclasses import dataclass

from shared.contracts.events import ChunkStamp, StageTiming
from shared.contracts.refs import TensorRef
from shared.engine.plan.items import Item

Timings = tuple[StageTiming, ...]
Each = tuple[Timings, ...] | None


@dataclass(slots=True)
class Work:
    """One candidate for a batch. ``item`` is None for a block that has not entered step 0 yet. Never changed once made."""

    stream: str
    frames: int
    stamps: tuple[ChunkStamp, ...]
    inputs: tuple[TensorRef, ...]
    deadline_ns: int  # of the first frame; 0 when lossless
    last_deadline_ns: int
    ready_ns: int
    noise_scale: float = 0.0
    first_timestep: int = 0
    item: Item | None = None
    context: int = 0  # latent frames of the window that run along (a re-cache)
    noise_version: int = 0
    still: bool = False  # as in Item
    timings: Timings = ()
    arrived: tuple[Timings, ...] = ()  # as in BatchEntry

    @property
    def live(self) -> bool:
        """Whether late is worse than lost for this work."""
        return self.stamps[0].live

    @property
    def forward_frames(self) -> int:
        """Latent frames of its forwards."""
        return self.context + self.frames

    def at(
        self, item: Item, timings: Timings, inputs: tuple[TensorRef, ...], ready_ns: int, arrived: Each = None
    ) -> Work:
        """The same block with another item, or ready again for its next step (three times as fast as ``replace``)."""
        return Work(
            self.stream,
            self.frames,
            self.stamps,
            inputs,
            self.deadline_ns,
            self.last_deadline_ns,
            ready_ns,
            self.noise_scale,
            self.first_timestep,
            item,
            self.context,
            self.noise_version,
            self.still,
            timings,
            self.arrived if arrived is None else arrived,
        )


@dataclass(frozen=True, slots=True)
class Applied:
    """A command's change took effect with this chunk; a blend is over with chunk ``until`` (−1: there is none)."""

    stream: str
    command: str
    version: int
    chunk: int
    pts: int
    until: int = -1
