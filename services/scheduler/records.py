"""What the scheduler knows of one stream's life: where it is placed, its prompt versions, who must let it go."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from enum import StrEnum

from services.scheduler.ladder import Wish
from services.scheduler.pricing import Demand
from shared.contracts.commands import PromptPart, StreamSpec
from shared.contracts.tiers import Promise, Tier
from shared.engine.plan.prompts import PromptLedger


class Phase(StrEnum):
    """A stream's life as the scheduler drives it."""

    OPENING = "opening"
    RUNNING = "running"
    RECOVERING = "recovering"  # a worker of it is lost; its source is held until it is placed anew
    STOPPING = "stopping"
    ENDED = "ended"


_MOVES = {
    Phase.OPENING: {Phase.RUNNING, Phase.STOPPING, Phase.ENDED},
    Phase.RUNNING: {Phase.RECOVERING, Phase.STOPPING, Phase.ENDED},
    Phase.RECOVERING: {Phase.RUNNING, Phase.STOPPING, Phase.ENDED},
    Phase.STOPPING: {Phase.ENDED},
    Phase.ENDED: set[Phase](),
}


@dataclass(slots=True)
class StreamRecord:
    """One stream on this scheduler."""

    stream: str
    epoch: int
    spec: StreamSpec
    width: int
    height: int
    noise: float
    noise_version: int = 0
    paused: bool = False
    suspended: bool = False  # its state is in the workers' host memory, while it is paused
    source_held: bool = False
    skip_similar: float = 0.0
    steadying: float = 0.0
    refreshes: int = 0  # changes after which ingest skips nothing until they are seen
    frames_per_block: int = 1  # the largest T it has run with: credits are enough for it
    since_epoch: int = 0  # the one it was opened in: egress tells of that one until it has shown all of it
    epoch_from: int = 0  # the first chunk that carries the epoch
    pipeline: str = ""
    workers: tuple[str, ...] = ()
    ingest: str = ""
    egress: str = ""
    motion: str = ""
    phase: Phase = Phase.OPENING
    failure: str | None = None
    demand: Demand | None = None  # what it was promised
    promise: Promise | None = None
    wish: Wish | None = None  # what it asks for now, and its bounds
    tier: Tier | None = None  # what it has now
    pace_fps: float = 0.0  # what ingest takes of its source; 0: everything
    pace_version: int = 0
    fps_cap: float = 0.0  # its user's own limit on the source's rate; 0: none
    parts: tuple[PromptPart, ...] = ()  # what its prompt is mixed of; empty: it is one prompt
    added_sinks: set[str] = field(default_factory=set[str])  # ids of those that it was not started with
    fps_seen: float = 0.0  # of the source, as its chunks come; 0: not known yet
    prompts: PromptLedger = field(default_factory=PromptLedger)
    changing: asyncio.Lock = field(default_factory=asyncio.Lock)

    def move(self, to: Phase) -> None:
        """Raises ValueError naming the move when it is not legal."""
        if to not in _MOVES[self.phase]:
            raise ValueError(f"stream {self.stream}: illegal move {self.phase} → {to}")
        self.phase = to

    def tells(self, epoch: int) -> bool:
        """Whether an event of this epoch is of this life of the stream (0: it does not say)."""
        return epoch == 0 or (self.since_epoch or self.epoch) <= epoch <= self.epoch

    def holders(self) -> set[str]:
        """Instances whose death costs this stream its state. Motion resumes from its mirror."""
        return {self.ingest, self.egress, *self.workers} - {""}

    def assignment(self) -> dict[str, object]:
        """What is kept in the session store, enough for another leader to end the stream."""
        return {
            "epoch": self.epoch,
            "pipeline": self.pipeline,
            "workers": list(self.workers),
            "ingest": self.ingest,
            "egress": self.egress,
            "motion": self.motion,
            "width": self.width,
            "height": self.height,
            "noise": self.noise,
            "noise_version": self.noise_version,
        }


class Answers:
    """Futures for answers that arrive as messages; an answer nobody waits for is ignored."""

    def __init__(self) -> None:
        self._waiting: dict[tuple[str, ...], asyncio.Future[str | None]] = {}

    def expect(self, *key: str) -> asyncio.Future[str | None]:
        """The future of one answer: None for yes, one line for no."""
        future = self._waiting.get(key)
        if future is None or future.done():
            future = asyncio.get_running_loop().create_future()
            self._waiting[key] = future
        return future

    def answer(self, error: str | None, *key: str) -> None:
        """An answer came."""
        future = self._waiting.pop(key, None)
        if future is not None and not future.done():
            future.set_result(error)

    def forget(self, *key: str) -> None:
        """Nobody waits any longer."""
        self._waiting.pop(key, None)
