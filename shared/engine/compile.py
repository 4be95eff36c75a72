"""Faster ways to run the same forward: compiled pieces of a block, and on a GPU whole forwards as CUDA graphs.

Both need fixed shapes, which a batch of given size, T and full rings has. A piece is compiled once and serves every block; a
graph is captured once per bucket (items, frames, size, neighbouring slots) and replayed with new inputs. What cannot be
compiled or captured runs as it stands, and says so once.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor

from shared.engine.forward import StepForward, StepInputs
from shared.engine.model.dit import Block
from shared.engine.model.kv_cache import KvPool

log = logging.getLogger(__name__)

MAX_GRAPHS = 32
EAGER_RUNS = 2
"""Forwards of a bucket before it is captured: they compile the pieces and set up the libraries' workspaces."""
MAX_SHAPES = 64
"""Shapes a piece may be compiled for before the compiler gives up on it."""


class Speed(StrEnum):
    """How a stage runs its forward."""

    AUTO = "auto"  # compiled graphs on a GPU, eager on a CPU
    EAGER = "eager"
    COMPILED = "compiled"
    GRAPHS = "graphs"  # CUDA graphs of compiled pieces; GPU only

    def on(self, device: torch.device) -> Speed:
        """What this means on a device. Raises ValueError where it is not possible."""
        if self is Speed.AUTO:
            return Speed.GRAPHS if device.type == "cuda" else Speed.EAGER
        if self is Speed.GRAPHS and device.type != "cuda":
            raise ValueError(f"speed 'graphs' needs a GPU, the device is {device}: use 'compiled' or 'eager'")
        return self


class Piece:
    """A compiled function that falls back to the plain one, once and for good, when the compiler fails.

    The compiler is imported here, not above: a worker that runs eager forwards would load a second of it for nothing.
    """

    def __init__(self, plain: Callable[..., Any]) -> None:
        from torch._dynamo.exc import TorchDynamoException

        self._plain, self._failure = plain, TorchDynamoException
        self._fast: Callable[..., Any] | None = torch.compile(plain, dynamic=False)

    def __call__(self, *args: Any) -> Any:
        """The plain function's result."""
        if self._fast is None:
            return self._plain(*args)
        try:
            return self._fast(*args)
        except self._failure as error:
            log.warning("%s runs without the compiler: %s", self._plain.__name__, str(error).splitlines()[0])
            self._fast = None
            return self._plain(*args)


def make_forward(forward: StepForward, speed: Speed, device: torch.device) -> Callable[[StepInputs], Tensor]:
    """The forward at this speed. Raises ValueError where the device does not allow it."""
    speed = speed.on(device)
    if speed is Speed.EAGER:
        return forward
    from torch._dynamo import config as dynamo_config

    dynamo_config.recompile_limit = max(dynamo_config.recompile_limit, MAX_SHAPES)
    fast = StepForward(forward.model, forward.prompts, forward.kernel, Piece(Block.project), Piece(Block.finish))
    return GraphedForward(fast, cuda_recorder()) if speed is Speed.GRAPHS else fast


Replay = Callable[[], Tensor]
Recorder = Callable[[Callable[[], Tensor]], Replay]
"""Takes a fixed sequence of kernels without running it; what it returns runs them and gives their result, in place."""


def cuda_recorder() -> Recorder:
    """Records CUDA graphs; they share one memory pool, since only one runs at a time. Raises RuntimeError per recording."""
    memory = torch.cuda.graph_pool_handle()

    def record(work: Callable[[], Tensor]) -> Replay:
        graph = torch.cuda.CUDAGraph()
        # Other threads go on with the autoencoder meanwhile.
        with torch.cuda.graph(graph, pool=memory, capture_error_mode="thread_local"):
            output = work()

        def replay() -> Tensor:
            graph.replay()
            return output

        return replay

    return record


@dataclass(frozen=True, slots=True)
class _Recorded:
    replay: Replay
    inputs: StepInputs


class GraphedForward:
    """Records a forward per bucket and replays it. Buckets used least recently go first; ``counts`` tells what ran how."""

    def __init__(self, forward: StepForward, record: Recorder) -> None:
        self._forward, self._record = forward, record
        self._graphs: OrderedDict[tuple[Any, ...], _Recorded] = OrderedDict()
        self._met: OrderedDict[tuple[Any, ...], int] = OrderedDict()
        self._works = True
        self.counts = {"eager": 0, "recorded": 0, "replayed": 0}

    def __call__(self, step: StepInputs) -> Tensor:
        """As the forward itself."""
        if not self._works or not step.cache.uniform or step.cache.pool.rule.attends_unwritten:
            return self._eager(step)
        step = step.with_prompt_tensor()
        bucket = self._bucket(step)
        held = self._graphs.get(bucket)
        if held is None:
            if not self._is_warm(bucket) or (held := self._take(bucket, step)) is None:
                return self._eager(step)
        else:
            self._graphs.move_to_end(bucket)
            for static, fresh in zip(held.inputs.tensors(), step.tensors(), strict=True):
                static.copy_(fresh, non_blocking=True)
        self.counts["replayed"] += 1
        return held.replay().clone()

    def forget(self, pool: KvPool) -> None:
        """The pool is gone: let go what was recorded on it."""
        gone = [bucket for bucket, held in self._graphs.items() if held.inputs.cache.pool is pool]
        for bucket in gone:
            del self._graphs[bucket]

    def _eager(self, step: StepInputs) -> Tensor:
        self.counts["eager"] += 1
        return self._forward(step)

    def _is_warm(self, bucket: tuple[Any, ...]) -> bool:
        met = self._met.pop(bucket, 0)
        self._met[bucket] = met + 1
        while len(self._met) > 4 * MAX_GRAPHS:
            self._met.popitem(last=False)
        return met >= EAGER_RUNS

    def _bucket(self, step: StepInputs) -> tuple[Any, ...]:
        """All that the recorded kernels depend on besides the tensors' contents."""
        pool = step.cache.pool
        # A pool that was made anew has other addresses: its graphs are never met again and age out.
        addresses = (pool.keys.data_ptr(), pool.generation, self._forward.prompts.generation)
        return (*(tuple(t.shape) for t in step.tensors()), step.frames, step.cache.run, *addresses)

    def _take(self, bucket: tuple[Any, ...], step: StepInputs) -> _Recorded | None:
        """Record the kernels. The step's own tensors become the graph's inputs, which later steps are copied into."""
        try:
            replay = self._record(lambda: self._forward(step))
        except RuntimeError as error:
            log.warning("forwards run without graphs: %s", str(error).splitlines()[0])
            self._works = False
            return None
        self.counts["recorded"] += 1
        self._graphs[bucket] = _Recorded(replay, step)
        while len(self._graphs) > MAX_GRAPHS:
            old, _ = self._graphs.popitem(last=False)
            self._met.pop(old, None)  # met again, it must be worth recording again
        return self._graphs[bucket]
