"""Who is there: instances known by their heartbeats, and the pipelines their workers make.

Pure and synchronous; time is passed in (seconds, monotonic).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import pairwise

from shared.contracts.events import Beat

STOOD_S = 0.5  # who looks every 50 ms and did not for so long was stopped, or starved


class Health(StrEnum):
    """What a beat, or its absence, says of an instance."""

    NEW = "new"
    ALIVE = "alive"
    RETURNED = "returned"  # same instance, new incarnation: it came back empty
    LOST = "lost"


@dataclass(slots=True)
class Member:
    """One instance and its newest beat."""

    beat: Beat
    seen: float
    lost: bool = False


@dataclass(frozen=True, slots=True)
class Pipeline:
    """A complete pipeline: one ready worker per stage, encode on the first, decode and text somewhere among them."""

    name: str
    model: str
    workers: tuple[str, ...]  # instance ids by stage
    blocks: tuple[range, ...] = ()  # DiT blocks by stage; empty when a worker did not tell
    decode_stage: int = 0
    draining: bool = False

    @property
    def stages(self) -> int:
        """S."""
        return len(self.workers)

    @property
    def fits(self) -> bool:
        """Whether the workers' blocks follow one another, as far as they have told."""
        return all(a.stop == b.start for a, b in pairwise(self.blocks)) and (
            not self.blocks or self.blocks[0].start == 0
        )


@dataclass(slots=True)
class Fleet:
    """All instances. An instance that misses its beats for ``timeout_s`` is lost until it beats again."""

    timeout_s: float
    looked: float | None = None
    members: dict[str, Member] = field(default_factory=lambda: dict[str, Member]())
    draining: dict[str, str] = field(default_factory=dict[str, str])  # instance → the incarnation that takes no stream
    _cut: dict[str, tuple[str, int, range]] = field(default_factory=dict[str, tuple[str, int, range]])

    def beat(self, beat: Beat, now: float) -> Health:
        """Take a beat."""
        known = self.members.get(beat.instance)
        self.members[beat.instance] = Member(beat, now)
        if known is None:
            return Health.NEW
        if known.beat.incarnation != beat.incarnation:
            return Health.RETURNED
        return Health.RETURNED if known.lost and beat.service == "worker" else Health.ALIVE

    def newly_lost(self, now: float) -> list[str]:
        """Instances whose beats have been missing too long, each told once. To be called often.

        Whoever asks may have stood still itself: beats that came meanwhile wait to be heard, and that time counts for nobody.
        """
        stood_s = now - self.looked if self.looked is not None else 0.0
        self.looked = now
        if stood_s > STOOD_S:
            for member in self.members.values():
                member.seen += stood_s
        lost: list[str] = []
        for instance, member in self.members.items():
            if not member.lost and now - member.seen > self.timeout_s:
                member.lost = True
                lost.append(instance)
        return lost

    def alive(self, instance: str) -> bool:
        """Whether the instance is known and beating."""
        member = self.members.get(instance)
        return member is not None and not member.lost

    def pick(self, service: str) -> str | None:
        """The ready instance of a service with the fewest streams."""
        ready = [m.beat for m in self.members.values() if m.beat.service == service and m.beat.ready and not m.lost]
        return min(ready, key=lambda beat: (len(beat.streams), beat.instance)).instance if ready else None

    def cut(self, pipeline: Pipeline, blocks: Sequence[range], generation: int) -> None:
        """Its workers have these blocks from this generation on; their next heartbeats will tell."""
        for worker, mine in zip(pipeline.workers, blocks, strict=True):
            if (member := self.members.get(worker)) is not None:
                self._cut[worker] = (member.beat.incarnation, generation, mine)

    def is_draining(self, beat: Beat) -> bool:
        """Whether this worker takes no stream. One that was started anew does."""
        return self.draining.get(beat.instance) == beat.incarnation

    def blocks_of(self, beat: Beat) -> range | None:
        """The DiT blocks that a worker has, None if it never told."""
        incarnation, generation, cut = self._cut.get(beat.instance, ("", 0, range(0)))
        if incarnation == beat.incarnation and beat.generation < generation:
            return cut  # the heartbeat is older than the cut
        return range(beat.first_block, beat.last_block + 1) if beat.first_block >= 0 else None

    def pipelines(self, usable: bool = True) -> list[Pipeline]:
        """Every complete pipeline, by name; ``usable``: that may take a stream, so is whole and not being emptied."""
        groups: dict[str, dict[int, Beat]] = {}
        for member in self.members.values():
            beat = member.beat
            if beat.service == "worker" and beat.ready and not member.lost and beat.pipeline and beat.stage >= 0:
                groups.setdefault(beat.pipeline, {})[beat.stage] = beat
        found: list[Pipeline] = []
        for name, stages in sorted(groups.items()):
            beats = [stages[stage] for stage in sorted(stages)]
            roles = {role for beat in beats for role in beat.roles}
            wanted = beats[0].stages
            numbered = sorted(stages) == list(range(wanted)) and {b.stages for b in beats} == {wanted}
            if numbered and roles >= {"encode", "stage", "decode"} and len({b.model for b in beats}) == 1:
                blocks = [self.blocks_of(beat) for beat in beats]
                pipeline = Pipeline(
                    name,
                    beats[0].model,
                    tuple(beat.instance for beat in beats),
                    tuple(each for each in blocks if each is not None) if None not in blocks else (),
                    next(at for at, beat in enumerate(beats) if "decode" in beat.roles),
                    any(self.is_draining(beat) for beat in beats),
                )
                if not usable or (pipeline.fits and not pipeline.draining):
                    found.append(pipeline)
        return found
