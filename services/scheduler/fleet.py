"""Who is there: instances known by their heartbeats, and the pipelines their workers make.

Pure and synchronous; time is passed in (seconds, monotonic).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

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

    @property
    def stages(self) -> int:
        """S."""
        return len(self.workers)


@dataclass(slots=True)
class Fleet:
    """All instances. An instance that misses its beats for ``timeout_s`` is lost until it beats again."""

    timeout_s: float
    looked: float | None = None
    members: dict[str, Member] = field(default_factory=lambda: dict[str, Member]())

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

    def pipelines(self) -> list[Pipeline]:
        """Every complete pipeline, by name."""
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
            if len(beats) == wanted and roles >= {"encode", "stage", "decode"} and len({b.model for b in beats}) == 1:
                found.append(Pipeline(name, beats[0].model, tuple(beat.instance for beat in beats)))
        return found
