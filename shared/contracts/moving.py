"""A stream's state from worker to worker, and blocks that change hands: what the scheduler asks, what a worker answers.

All of it goes to one worker (``rheo.worker.assign``) and is answered on ``rheo.moved``. Answers may be lost: ask again with
the same ``move``, and the same answer comes, without anything being done twice. An ``error`` is one line; nothing has changed
then. Blocks are numbered absolutely, so that two pipelines may be cut differently.

Blocks change hands within a pipeline while nothing of it is in flight: ``PrepareBlocks`` ahead on who gains some, then, with
the pipeline quiet, per stream ``ExportState`` of the blocks that go from the old holder and ``ImportState`` on the new one, and
``CutOver`` on *every* worker of the pipeline, with one new generation. What was imported for blocks that are only prepared
waits until then. No batch of the new generation may be sent before all have answered.

A stream changes its pipeline by ``TakeStream`` on the new workers in a higher epoch, ``ExportState`` from the old ones (blocks,
encode, decode), ``ImportState`` on the new ones, which take what they host of each and leave the rest.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from shared.contracts.refs import TensorRef, Wire


class BlockRange(Wire):
    """DiT blocks first…last of the model, both included."""

    first: int = Field(ge=0, lt=1024)
    last: int = Field(ge=0, lt=1024)

    @model_validator(mode="after")
    def _ascends(self) -> BlockRange:
        if self.last < self.first:
            raise ValueError(f"blocks {self.first}…{self.last} are no range")
        return self

    @property
    def blocks(self) -> range:
        """The numbers."""
        return range(self.first, self.last + 1)

    @classmethod
    def of(cls, blocks: range) -> BlockRange:
        """Of a range that is not empty."""
        return cls(first=blocks.start, last=blocks.stop - 1)


class StateParts(Wire):
    """A stream's exported state: one run of bytes, cut into tensors of uint8; ``layout`` says what lies where in it.

    ``source`` is unique to this export. The leases end with a cut-over, when the owner lets the stream go, or after a minute.
    """

    source: str
    layout: bytes
    parts: tuple[TensorRef, ...] = ()
    nbytes: int = 0


class ExportState(Wire):
    """scheduler → worker: copy a stream's state out, behind every batch and chunk that was admitted before.

    Answered by StateExported. ``blocks`` (None: none): the KV slots of all steps, of those of these blocks that the worker
    holds, with ring places, kept noisy latents (block 0's holder) and the prompts' embeddings. ``encode``, ``decode``: the
    autoencoder's caches, where the worker hosts those roles. The state stays where it is, too. Large states go in several
    exports of fewer blocks.
    """

    kind: Literal["export_state"] = "export_state"
    instance: str
    stream: str
    epoch: int
    move: str
    blocks: BlockRange | None = None
    encode: bool = False
    decode: bool = False


class StateExported(Wire):
    """worker → scheduler: answer to ExportState.

    ``encoded`` and ``decoded``: the newest chunk that went through those caches, −1 for none.
    """

    kind: Literal["state_exported"] = "state_exported"
    instance: str
    stream: str
    epoch: int
    move: str
    state: StateParts | None = None
    encoded: int = -1
    decoded: int = -1
    error: str | None = None


class ImportState(Wire):
    """scheduler → worker: take on a stream's state, of which this worker must hold the stream in this epoch.

    Answered by StateImported. Of ``state`` a worker takes what it hosts: its blocks' slots at once, those of prepared
    blocks at the cut-over, caches of its roles, and prompts that it has not. ``encoded``, ``decoded``: as exported; older
    chunks are repetitions from then on.
    """

    kind: Literal["import_state"] = "import_state"
    instance: str
    stream: str
    epoch: int
    move: str
    state: StateParts
    encoded: int = -1
    decoded: int = -1


class StateImported(Wire):
    """worker → scheduler: answer to ImportState."""

    kind: Literal["state_imported"] = "state_imported"
    instance: str
    stream: str
    epoch: int
    move: str
    error: str | None = None


class PrepareBlocks(Wire):
    """scheduler → worker: load the weights that a stage of ``blocks`` needs beyond those it has; it goes on serving.

    Answered by BlocksReady. A second one replaces what a first one prepared. ``blocks`` as they are now: what was prepared
    is let go.
    """

    kind: Literal["prepare_blocks"] = "prepare_blocks"
    instance: str
    pipeline: str
    move: str
    blocks: BlockRange


class BlocksReady(Wire):
    """worker → scheduler: answer to PrepareBlocks. ``load_ms``: what loading took."""

    kind: Literal["blocks_ready"] = "blocks_ready"
    instance: str
    pipeline: str
    move: str
    load_ms: float = 0.0
    error: str | None = None


class CutOver(Wire):
    """scheduler → worker: from this generation on the worker's stage is ``blocks``. Answered by BlocksCut.

    Slots keep what they hold, unlike with a generation that begins by a batch. Blocks that the worker gains must have been
    prepared; those that it loses are dropped with their slots. ``stage`` of ``stages``: its place in the pipeline from then on.
    Generations that are over by then are refused (answered again if it is this very one).
    """

    kind: Literal["cut_over"] = "cut_over"
    instance: str
    pipeline: str
    move: str
    term: int
    generation: int
    blocks: BlockRange
    stage: int = Field(ge=0, lt=1024)
    stages: int = Field(ge=1, le=1024)


class BlocksCut(Wire):
    """worker → scheduler: answer to CutOver.

    ``missing``: streams whose slots of new blocks were never imported; they cannot run before a reset.
    """

    kind: Literal["blocks_cut"] = "blocks_cut"
    instance: str
    pipeline: str
    move: str
    generation: int
    missing: tuple[str, ...] = ()
    error: str | None = None


class SuspendStream(Wire):
    """scheduler → worker: move a stream's slots and caches to host memory, or back (``suspended`` false).

    Answered by StreamSuspended. A suspended stream does not count among those that the worker may hold at once. A batch or
    chunk of it that comes all the same brings it back first. Moving back may fail where others have taken the room.
    """

    kind: Literal["suspend_stream"] = "suspend_stream"
    instance: str
    stream: str
    epoch: int
    move: str
    suspended: bool = True


class StreamSuspended(Wire):
    """worker → scheduler: answer to SuspendStream. ``host_bytes``: what the stream takes of host memory now."""

    kind: Literal["stream_suspended"] = "stream_suspended"
    instance: str
    stream: str
    epoch: int
    move: str
    suspended: bool = False
    host_bytes: int = 0
    error: str | None = None


MOVES = (ExportState, ImportState, PrepareBlocks, CutOver, SuspendStream)
"""What a worker is asked, on ``rheo.worker.assign``."""
MOVED = (StateExported, StateImported, BlocksReady, BlocksCut, StreamSuspended)
"""What it answers, on ``rheo.moved``."""

Move = ExportState | ImportState | PrepareBlocks | CutOver | SuspendStream
Moved = StateExported | StateImported | BlocksReady | BlocksCut | StreamSuspended
