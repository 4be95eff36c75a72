"""Small valid messages for tests."""

from __future__ import annotations

from typing import Any

from shared.contracts.commands import PatternSource, StreamSpec
from shared.contracts.events import ChunkStamp, FrameStamp
from shared.contracts.refs import TensorPlace, TensorRef


def spec(**changes: object) -> StreamSpec:
    """A stream of a test pattern."""
    return StreamSpec.model_validate({"source": PatternSource(), "prompt": "a pencil drawing", **changes})


def stamp(stream: str = "s1", chunk: int = 0, epoch: int = 1, trace: str = "", **changes: Any) -> ChunkStamp:
    """A chunk of four frames."""
    frames = tuple(FrameStamp(index=4 * chunk + i, pts=4 * chunk + i, captured_ns=1_000 + i) for i in range(4))
    made = ChunkStamp(stream=stream, epoch=epoch, chunk=chunk, frames=frames, trace=trace)
    return made.model_copy(update=changes)


def ref(owner: str = "worker-0") -> TensorRef:
    """A reference to a tensor that nobody holds."""
    return TensorRef(
        owner=owner, host="h", place=TensorPlace.LOCAL, shape=(1, 16, 8, 8), dtype="float32", slot=-5, generation=1
    )
