"""The ledger: what became of every input frame, exactly one verdict each. Pure; the only closer is egress."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from shared.contracts.events import LedgerTotals, SourceTotals

FIRST_CHUNK_FRAMES = 5
CHUNK_FRAMES = 4
_SERVICE = re.compile(r"(gateway|ingest|motion|scheduler|worker|egress)[-\w]*\W+(.*)", re.DOTALL)
_REASON = re.compile(r"[a-z0-9_ ]{1,32}")


@dataclass(frozen=True, slots=True)
class ChunkVerdict:
    """What became of a chunk's frames. ``dropped`` counts by "service:reason"."""

    chunk: int
    on_time: int = 0
    late: int = 0
    skipped: int = 0
    dropped: Mapping[str, int] = field(default_factory=dict[str, int])

    @property
    def frames(self) -> int:
        """Frames with a verdict here."""
        return self.on_time + self.late + self.skipped + sum(self.dropped.values())

    def counts(self) -> dict[str, int]:
        """The session store's form."""
        named = {"on_time": self.on_time, "late": self.late, "skipped": self.skipped}
        return {name: frames for name, frames in {**named, **self.dropped}.items() if frames}


def drop_key(failure: str) -> str:
    """ "service:reason" of a failure's one line: "worker-0 was restarted" → "worker:was restarted"."""
    found = _SERVICE.match(failure)
    service, reason = found.groups() if found is not None else ("scheduler", failure)
    if service == "ingest":
        # "ingest:…" are ingest's own running totals; a chunk that was numbered is not among them.
        service, reason = "scheduler", failure
    return f"{service}:{' '.join(reason.split())[:60] or 'failed'}"


def verdicts_of(totals: LedgerTotals) -> list[tuple[dict[str, str], int]]:
    """A ledger as labelled counts: verdict, and of what was dropped the service and the reason.

    The reason of a failure is its own words; those are not for labels, of which there may be few: "failed".
    """
    counts = [({"verdict": name}, getattr(totals, name)) for name in ("on_time", "late", "skipped")]
    for key, frames in totals.dropped.items():
        service, _, reason = key.partition(":")
        reason = reason if _REASON.fullmatch(reason) else "failed"
        counts.append(({"verdict": "dropped", "service": service, "reason": reason}, frames))
    return counts


class StreamLedger:
    """One stream's accounts.

    Chunks become known by their own messages or by ingest's running totals; a chunk known by its number alone has the
    frames that the totals leave for it. The first verdict of a chunk wins. Memory stays flat: what lies under the
    watermark ``through`` is remembered as sums.
    """

    def __init__(self, totals: LedgerTotals | None = None, closed_chunks: int = 0, through: int = 0) -> None:
        base = self._base = totals or LedgerTotals()
        self.closed_chunks = closed_chunks
        self.through = through
        self.ended = False
        self._on_time, self._late, self._skipped = base.on_time, base.late, base.skipped
        # Ingest's own drops are kept apart: they come as running totals, not as verdicts.
        self._dropped = {key: n for key, n in base.dropped.items() if not key.startswith("ingest:")}
        self._source = SourceTotals(
            captured=base.frames_in,
            dropped={key.removeprefix("ingest:"): n for key, n in base.dropped.items() if key.startswith("ingest:")},
        )
        self._sizes: dict[int, int] = {}
        self._closed_above: set[int] = set()
        self._closed_frames = self._on_time + self._late + self._skipped + sum(self._dropped.values())
        self._unaccounted = 0

    # --- what is known -----------------------------------------------------------------------------------------------

    @property
    def chunks(self) -> int:
        """Chunks known to exist: 0…chunks−1."""
        highest = max(self._sizes, default=-1) + 1
        return max(self._source.chunks, highest, self.through)

    def know(self, chunk: int, frames: int) -> None:
        """A message of the chunk itself was seen: it has so many real frames."""
        if chunk >= self.through and chunk not in self._closed_above:
            self._sizes.setdefault(chunk, frames)

    def observe(self, totals: SourceTotals, *, ended: bool) -> None:
        """Ingest's running totals, in any order; only what is newer counts."""
        old = self._source
        reasons = old.dropped.keys() | totals.dropped.keys()
        self._source = SourceTotals(
            captured=max(old.captured, totals.captured),
            numbered=max(old.numbered, totals.numbered),
            chunks=max(old.chunks, totals.chunks),
            dropped={reason: max(old.dropped.get(reason, 0), totals.dropped.get(reason, 0)) for reason in reasons},
        )
        self.ended = self.ended or ended

    def is_closed(self, chunk: int) -> bool:
        """Whether the chunk has its verdict."""
        return chunk < self.through or chunk in self._closed_above

    def open_chunks(self) -> list[int]:
        """Known chunks without a verdict, ascending."""
        return [chunk for chunk in range(self.through, self.chunks) if chunk not in self._closed_above]

    @property
    def complete(self) -> bool:
        """The source has ended and every chunk has its verdict."""
        return self.ended and self.through >= self._source.chunks

    def frames_of(self, chunk: int) -> int:
        """The chunk's real frames: as seen, or what the totals leave for the chunks that nobody saw."""
        known = self._sizes.get(chunk)
        if known is not None:
            return known
        full = _full(chunk)
        # Only a source's last chunk is padded: any other unseen one is full, and the last unseen one has the rest.
        unseen = [c for c in self.open_chunks() if c not in self._sizes and c < self._source.chunks]
        if not unseen or chunk != unseen[-1]:
            return full
        seen = sum(frames for c, frames in self._sizes.items() if c < self._source.chunks)
        rest = self._source.numbered - self._closed_frames - seen - sum(_full(c) for c in unseen[:-1])
        return max(1, min(full, rest)) if rest > 0 else full

    # --- verdicts ----------------------------------------------------------------------------------------------------

    def close(self, verdict: ChunkVerdict) -> bool:
        """Give a chunk its verdict; False when it has one. Raises ValueError when the frames do not add up."""
        chunk = verdict.chunk
        if self.is_closed(chunk):
            return False
        if verdict.frames != self.frames_of(chunk):
            raise ValueError(f"chunk {chunk} has {self.frames_of(chunk)} frames; a verdict for {verdict.frames} came")
        self._on_time += verdict.on_time
        self._late += verdict.late
        self._skipped += verdict.skipped
        for key, frames in verdict.dropped.items():
            self._dropped[key] = self._dropped.get(key, 0) + frames
        self._closed_frames += verdict.frames
        self.closed_chunks += 1
        self._sizes.pop(chunk, None)
        self._closed_above.add(chunk)
        while self.through in self._closed_above:
            self._closed_above.discard(self.through)
            self.through += 1
        return True

    def retract(self, verdict: ChunkVerdict) -> None:
        """A predecessor had closed this chunk: its verdict stands in the store, and this one is taken back."""
        self._on_time -= verdict.on_time
        self._late -= verdict.late
        self._skipped -= verdict.skipped
        for key, frames in verdict.dropped.items():
            self._dropped[key] -= frames
        self._closed_frames -= verdict.frames
        self.closed_chunks -= 1

    def settle(self) -> None:
        """Nothing more comes of a source that never told its end: its captured, unnumbered frames are lost with it."""
        source = self._source
        if not self.ended:
            missing = source.captured - max(source.numbered, self._closed_frames) - sum(source.dropped.values())
            self._unaccounted = max(0, missing)
        self.ended = True

    def totals(self) -> LedgerTotals:
        """The ledger now. Once complete: ``frames_in == on_time + late + dropped + skipped``."""
        source = self._source
        dropped = {key: frames for key, frames in self._dropped.items() if frames}
        for reason, frames in source.dropped.items():
            dropped[f"ingest:{reason}"] = frames
        if self._unaccounted:
            dropped["ingest:lost"] = dropped.get("ingest:lost", 0) + self._unaccounted
        given = self._on_time + self._late + self._skipped + sum(dropped.values())
        return LedgerTotals(
            frames_in=max(source.captured, given),
            on_time=self._on_time,
            late=self._late,
            skipped=self._skipped,
            dropped=dict(sorted(dropped.items())),
        )

    def totals_here(self) -> LedgerTotals:
        """The ledger less what it began with: what a predecessor has counted is not counted again."""
        totals, base = self.totals(), self._base
        return LedgerTotals(
            frames_in=totals.frames_in - base.frames_in,
            on_time=totals.on_time - base.on_time,
            late=totals.late - base.late,
            skipped=totals.skipped - base.skipped,
            dropped={key: n for key, frames in totals.dropped.items() if (n := frames - base.dropped.get(key, 0))},
        )

    def ingest_drops(self) -> tuple[int, dict[str, int]]:
        """(frames in, drops at ingest by "ingest:reason"), for the session store."""
        drops = {f"ingest:{reason}": frames for reason, frames in self._source.dropped.items()}
        if self._unaccounted:
            drops["ingest:lost"] = drops.get("ingest:lost", 0) + self._unaccounted
        return self.totals().frames_in, drops


def _full(chunk: int) -> int:
    return FIRST_CHUNK_FRAMES if chunk == 0 else CHUNK_FRAMES
