"""Prompt versions of one stream: a version is used only after every stage has said that it is ready."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


def digest(model: str, prompt: str) -> str:
    """The key of a prompt's embedding: SHA-256 in hex over model and prompt, told apart by a zero byte."""
    return hashlib.sha256(f"{model}\0{prompt}".encode()).hexdigest()


def mix_digest(model: str, parts: Sequence[tuple[str, float]]) -> str:
    """The key of a mix of prompts (text, weight): the same for the same proportions, whatever their order."""
    total = sum(weight for _, weight in parts)
    words = "\0".join(f"{weight / total:.4f}\0{text}" for text, weight in sorted(parts))
    return hashlib.sha256(f"mix\0{model}\0{words}".encode()).hexdigest()


def mix_text(parts: Sequence[tuple[str, float]]) -> str:
    """A mix in words, the heaviest first: "70 % a pencil drawing + 30 % neon lights"."""
    total = sum(weight for _, weight in parts)
    ordered = sorted(parts, key=lambda part: -part[1])
    return " + ".join(f"{100 * weight / total:.0f} % {text.strip()}" for text, weight in ordered)


class PromptState(StrEnum):
    """A version's life. Ready can fall back to preparing: a stage that comes back empty has lost the prompt."""

    PREPARING = "preparing"
    READY = "ready"
    RETIRED = "retired"


_MOVES: Mapping[PromptState, frozenset[PromptState]] = {
    PromptState.PREPARING: frozenset({PromptState.READY, PromptState.RETIRED}),
    PromptState.READY: frozenset({PromptState.PREPARING, PromptState.RETIRED}),
    PromptState.RETIRED: frozenset(),
}


class IllegalPromptMoveError(ValueError):
    """A version cannot go from its state to the wanted one; the message names the move."""


class PromptNotReadyError(LookupError):
    """A version was to be used before every stage said it is ready, or after it was retired, or it never existed."""


@dataclass(slots=True)
class PromptVersion:
    """One version: the embedding's digest, how many stages must be ready, and which are."""

    version: int
    digest: str
    stages: int
    state: PromptState = PromptState.PREPARING
    ready: set[int] = field(default_factory=lambda: set[int]())

    @property
    def missing(self) -> tuple[int, ...]:
        """Stages that have not said ready."""
        return tuple(stage for stage in range(self.stages) if stage not in self.ready)


class PromptLedger:
    """Version → digest and state, for one stream. Versions ascend from 1; retired ones are forgotten, so it stays small."""

    def __init__(self) -> None:
        self._versions: dict[int, PromptVersion] = {}
        self._newest = 0

    def prepare(self, embedding: str, stages: int) -> int:
        """Begin a new version of ``embedding`` (a digest) on ``stages`` stages. Returns its number."""
        if stages < 1:
            raise ValueError("a prompt needs at least one stage to be prepared on")
        self._newest += 1
        self._versions[self._newest] = PromptVersion(self._newest, embedding, stages)
        return self._newest

    def stage_ready(self, version: int, stage: int) -> bool:
        """A stage has the version's cross-attention K/V. Returns whether the version became ready with this.

        Repeats, and answers for a version retired meanwhile, change nothing. Raises ValueError for a foreign stage.
        """
        entry = self._versions.get(version)
        if entry is None:
            if 1 <= version <= self._newest:
                return False
            raise PromptNotReadyError(f"prompt version {version} was never prepared")
        if not 0 <= stage < entry.stages:
            raise ValueError(f"stage {stage} is none of the {entry.stages} that prepare prompt version {version}")
        entry.ready.add(stage)
        if entry.missing or entry.state is PromptState.READY:
            return False
        self._move(entry, PromptState.READY)
        return True

    def stage_lost(self, stage: int) -> tuple[int, ...]:
        """A stage came back empty. Returns the versions that must be prepared on it again before they may be used."""
        hit = [entry for entry in self._versions.values() if stage < entry.stages]
        for entry in hit:
            entry.ready.discard(stage)
            if entry.state is PromptState.READY:
                self._move(entry, PromptState.PREPARING)
        return tuple(entry.version for entry in hit)

    def retire(self, version: int) -> None:
        """No block will be bound to the version any more. Legal once; raises IllegalPromptMoveError after that."""
        entry = self._versions.get(version)
        if entry is None:
            raise IllegalPromptMoveError(f"prompt version {version}: illegal move retired → retired")
        self._move(entry, PromptState.RETIRED)
        del self._versions[version]

    def retire_before(self, version: int) -> tuple[int, ...]:
        """Retire every version older than ``version``; returns them."""
        older = tuple(number for number in self._versions if number < version)
        for number in older:
            self.retire(number)
        return older

    def state_of(self, version: int) -> PromptState:
        """A version's state. Raises PromptNotReadyError for one that was never prepared."""
        entry = self._versions.get(version)
        if entry is not None:
            return entry.state
        if 1 <= version <= self._newest:
            return PromptState.RETIRED
        raise PromptNotReadyError(f"prompt version {version} was never prepared")

    def digest_of(self, version: int) -> str:
        """The digest of a version that is not retired. Raises PromptNotReadyError for any other."""
        entry = self._versions.get(version)
        if entry is None:
            raise PromptNotReadyError(f"prompt version {version} is {self.state_of(version)}")
        return entry.digest

    def require(self, version: int) -> str:
        """The digest of a version that may be used. Raises PromptNotReadyError with the reason otherwise."""
        entry = self._versions.get(version)
        if entry is not None and entry.state is PromptState.READY:
            return entry.digest
        state = self.state_of(version)
        waiting = f", stages {entry.missing} are missing" if entry is not None else ""
        raise PromptNotReadyError(f"prompt version {version} is {state}{waiting}")

    @property
    def newest_ready(self) -> int | None:
        """The newest version that every stage is ready for, or None."""
        ready = [number for number, entry in self._versions.items() if entry.state is PromptState.READY]
        return max(ready, default=None)

    @property
    def kept(self) -> frozenset[int]:
        """Versions that are not retired: what the stages must keep."""
        return frozenset(self._versions)

    @staticmethod
    def _move(entry: PromptVersion, to: PromptState) -> None:
        if to not in _MOVES[entry.state]:
            raise IllegalPromptMoveError(f"prompt version {entry.version}: illegal move {entry.state} → {to}")
        entry.state = to

    def state(self) -> dict[str, Any]:
        """Plain values, enough for :meth:`from_state`."""
        rows = [[e.version, e.digest, e.stages, e.state.value, sorted(e.ready)] for e in self._versions.values()]
        return {"newest": self._newest, "versions": rows}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> PromptLedger:
        """The ledger whose :meth:`state` this is."""
        ledger = cls()
        ledger._newest = int(state["newest"])
        for version, embedding, stages, name, ready in state["versions"]:
            ledger._versions[version] = PromptVersion(version, embedding, stages, PromptState(name), set(ready))
        return ledger
