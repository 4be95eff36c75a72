"""The public StreamDiffusionV2 code beside the engine: same weights, shapes and noise, one run, alternating tick by tick.

Nothing of it is part of this project: it is imported from a checkout that the user names, module by module and without its
package ``__init__`` files, which ask for tokenizers and checkpoints that a forward does not need. Its model and its
noise schedule are its own; around them stands what its streaming loop does at every tick: shift the rows, noise the
entering one, forward, x0 in double precision, re-noise all rows but the last.
"""

from __future__ import annotations

import importlib
import logging
import statistics
import sys
import time
import types
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.lockstep import LockStep, timed
from shared.engine.compile import Speed
from shared.engine.model.loading import random_dit_weights
from shared.engine.plan.items import Item, SlotOp, SlotOpKind
from shared.engine.plan.noise_controller import step_timesteps
from shared.engine.plan.spec import ModelSpec, spec_of
from shared.engine.stage import Stage

_PACKAGES = ("models", "models.wan", "models.wan.wan_base", "models.wan.wan_base.modules")
STREAM = "beside"


class PeerError(ValueError):
    """PATH holds no such code; one line."""


@dataclass(frozen=True, slots=True)
class Beside:
    """Milliseconds of one tick (K rows, re-noising included). ``same`` is the largest difference of x0 over all ticks.

    ``engine`` is the engine as it serves; ``reference`` the engine under the public code's rule of ring places, which
    computes the same numbers. Ratios are peer over engine: above 1 the engine is faster. ``cpu_ratio`` compares the
    medians of processor time, which other work on the machine disturbs less than it does the clock.
    """

    peer: float
    engine: float
    reference: float
    least_peer: float
    least_engine: float
    ratio: float
    least_ratio: float
    cpu_ratio: float
    same: float
    equal: bool
    ticks: int


@dataclass(frozen=True, slots=True)
class Record:
    """One comparison's question. The prompt has ``words`` vectors of ``text_dim`` and zeros up to ``text_len``."""

    model: str
    width: int
    height: int
    steps: int
    text_len: int
    dtype: str
    threads: int
    compiled: bool = False
    text_dim: int = 128
    words: int = 16


TOLERANCE = {"float32": 1e-4, "bfloat16": 0.1}
"""How far x0 may be off between two ways to the same numbers."""


def records() -> list[Record]:
    """The settings that docs/benchmarks.md records: the embedded model's, in float32, then what bfloat16 and compiling add."""
    return [
        Record("rheo-tiny", 320, 192, 2, text_len, dtype, threads, compiled, text_dim, words)
        for dtype, compiled in (("float32", False), ("float32", True), ("bfloat16", False), ("bfloat16", True))
        for threads in (1, 2)
        # The embedded model's own prompts, and the published models': 512 vectors of 4096, most of them padding.
        for text_len, text_dim, words in ((16, 128, 16), (512, 4096, 24))
    ]


def compare(path: Path, record: Record, ticks: int) -> Beside:
    """One record. Raises PeerError, SpecError."""
    torch.set_num_threads(record.threads)
    spec = replace(spec_of(record.model), text_len=record.text_len, text_dim=record.text_dim)
    size, dtype = (record.width, record.height), getattr(torch, record.dtype)
    return beside(path, spec, size, record.steps, ticks, dtype, record.compiled, record.words)


def import_peer(path: Path) -> tuple[Any, Any]:
    """(its causal model's module, its flow-matching module) from a checkout. Raises PeerError."""
    path = path.resolve()
    if not (path / "models" / "wan" / "causal_model.py").is_file():
        raise PeerError(f"{path} is no StreamDiffusionV2 checkout: it has no models/wan/causal_model.py")
    if "models" in sys.modules:
        held = list(getattr(sys.modules["models"], "__path__", []))
        if held != [str(path / "models")]:
            raise PeerError(f"another package named models is loaded from {held}: run the comparison by itself")
    for name in _PACKAGES:
        # A package without its __init__: the modules under it are found, nothing else of it runs.
        package = types.ModuleType(name)
        package.__path__ = [str(path.joinpath(*name.split(".")))]
        sys.modules.setdefault(name, package)
    try:
        return (importlib.import_module("models.wan.causal_model"), importlib.import_module("models.wan.flow_match"))
    except ImportError as error:
        raise PeerError(f"{path} needs a package that is not installed: {error}") from None


class Peer:
    """Its model with one stream of K rows."""

    def __init__(
        self, modules: tuple[Any, Any], spec: ModelSpec, weights: dict[str, Tensor], dtype: torch.dtype
    ) -> None:
        causal, flow = modules
        self.spec, self.dtype = spec, dtype
        self.model = causal.CausalWanModel(
            model_type="t2v",
            text_len=spec.text_len,
            in_dim=spec.latent_channels,
            out_dim=spec.latent_channels,
            dim=spec.dim,
            ffn_dim=spec.ffn_dim,
            freq_dim=spec.freq_dim,
            text_dim=spec.text_dim,
            num_heads=spec.heads,
            num_layers=spec.layers,
        )
        self.model.load_state_dict(weights)
        self.model.eval().requires_grad_(False).to(dtype)
        self.schedule = flow.FlowMatchScheduler(shift=spec.sigma_shift, sigma_min=0.0, extra_one_step=True)
        self.schedule.set_timesteps(1000, training=True)
        self.drawn: list[Tensor] = []
        self.x0 = torch.empty(0)

    def prepare(self, noisy: Tensor, prompt: Tensor, steps: Sequence[int]) -> None:
        """The first block [1, 2, C, h, w], its steps one after the other; then K copies of its cache."""
        spec, (rows, columns) = self.spec, (noisy.shape[-2] // 2, noisy.shape[-1] // 2)
        self.tokens, self.steps = rows * columns, torch.tensor(steps)
        self.prompt = prompt.to(self.dtype)[None]
        self.cache: list[dict[str, Any]] = []
        self.cross: list[dict[str, Any]] = [{"k": None, "v": None, "is_init": False} for _ in range(spec.layers)]
        for block in self.model.blocks:
            block.self_attn.sink_size = spec.sinks
            block.self_attn.adapt_sink_thr = -1 if spec.sink_threshold is None else spec.sink_threshold
            block.self_attn.evict_idx = None
            shape = (1, spec.ring * self.tokens, spec.heads, spec.head_dim)
            self.cache.append(
                {
                    "k": torch.zeros(shape, dtype=self.dtype),
                    "v": torch.zeros(shape, dtype=self.dtype),
                    "global_end_index": torch.zeros(1, dtype=torch.long),
                    "local_end_index": torch.zeros(1, dtype=torch.long),
                    "total_steps": len(steps),
                    "current_step": len(steps),
                }
            )
        frames = noisy.shape[1]
        end = frames * self.tokens
        self.drawn, x = [], noisy.to(self.dtype)
        for index, step in enumerate(steps):
            times = torch.full((1, frames), step)
            clean = self._forward(x, times, torch.tensor([0]), torch.tensor([end]))
            if index + 1 < len(steps):
                x = self._renoise(clean[0], steps[index + 1])[None]
        self.x0 = clean
        count = len(steps)
        for kv, cross in zip(self.cache, self.cross, strict=True):
            for name in ("k", "v"):
                kv[name] = kv[name].repeat(count, 1, 1, 1)
                cross[name] = cross[name].expand(count, -1, -1, -1)
            for name in ("global_end_index", "local_end_index"):
                kv[name] = kv[name].repeat(count)
        self.prompt = self.prompt.repeat(count, 1, 1)
        self.rows = torch.zeros(count, 1, *noisy.shape[2:], dtype=self.dtype)
        self.starts = torch.full((count,), end)
        self.ends = self.starts + self.tokens

    def tick(self, latents: Tensor, scale: float, first_step: int, start_frame: int) -> Tensor:
        """Source latents [1, 1, C, h, w] enter row 0 → x0 of all rows [K, 1, C, h, w]."""
        self.drawn = []
        noise = torch.randn_like(latents)
        self.drawn.append(noise)
        self.rows[1:] = self.rows[:-1].clone()
        self.rows[0] = (noise * scale + latents * (1 - scale))[0].to(self.dtype)
        start = start_frame * self.tokens
        for held, new in ((self.starts, start), (self.ends, start + self.tokens)):
            held[1:] = held[:-1].clone()
            held[0] = new
        self.steps[0] = first_step
        clean = self._forward(self.rows, self.steps[:, None], self.starts, self.ends)
        self.rows = clean.clone()
        for row in range(len(self.rows) - 1):
            self.rows[row] = self._renoise(clean[row], int(self.steps[row + 1]))
        self.x0 = clean
        return clean

    def _forward(self, x: Tensor, times: Tensor, starts: Tensor, ends: Tensor) -> Tensor:
        flow = self.model(
            x.transpose(1, 2),
            t=times,
            context=self.prompt,
            seq_len=32760,
            kv_cache=self.cache,
            crossattn_cache=self.cross,
            current_start=starts,
            current_end=ends,
        ).transpose(1, 2)
        # As its wrapper does: the nearest of the schedule's thousand steps, in double precision.
        table = self.schedule.timesteps.double()
        nearest = (table[None] - times.double().flatten()[:, None]).abs().argmin(1)
        sigma = self.schedule.sigmas.double()[nearest].reshape(*times.shape, 1, 1, 1)
        return (x.double() - sigma * flow.double()).to(flow.dtype)

    def _renoise(self, clean: Tensor, step: int) -> Tensor:
        noise = torch.randn_like(clean)
        self.drawn.append(noise.float())
        return self.schedule.add_noise(clean, noise, torch.full((1,), step))


class SharedNoise:
    """A NoiseSource that hands out what the peer drew: entry noise first, then one ε per re-noised row."""

    def __init__(self) -> None:
        self.entry = torch.empty(0)
        self.again: dict[int, Tensor] = {}

    def draw(self, items: Sequence[Item], step_offset: int, shape: tuple[int, int, int]) -> Tensor:
        """See :class:`shared.engine.random.NoiseSource`."""
        if step_offset == 0:
            return self.entry.reshape(len(items), items[0].frames, *shape)
        return torch.stack([self.again[item.step].reshape(items[0].frames, *shape) for item in items])


class Reference:
    """The engine's stage on the peer's rows: its rule of places, its idle rows, its rotation left as it was written."""

    def __init__(self, stage: Stage, noise: SharedNoise, size: tuple[int, int], prompt: Tensor) -> None:
        self.stage, self.noise = stage, noise
        stage.open(STREAM, *size)
        stage.set_prompt(STREAM, 1, prompt)

    def prepare(self, noisy: Tensor, steps: Sequence[int], drawn: list[Tensor]) -> Tensor:
        """The first block; returns its x0."""
        reset = (SlotOp(SlotOpKind.RESET, 0),)
        frames = noisy.shape[1]
        # s = 1 and the given input as its noise: nothing is mixed in.
        self.noise.entry = noisy
        item = Item(STREAM, 0, 0, 0, 0, frames, 0, 0, 1.0, tuple(steps), 0, 1, reset)
        x = noisy
        for step in range(len(steps)):
            x0 = self.stage.run([item], x)
            if step + 1 < len(steps):
                self.noise.again = {step: drawn[step]}
                x = self.stage.renoise([item], x0)
                item = item.next_step(0, reset)
        self.rows: list[Item | None] = [None] * len(steps)
        self.inputs = torch.zeros(len(steps), 1, *noisy.shape[2:])
        self.first, self.count, self.steps = frames, 0, tuple(steps)
        return x0

    def tick(self, latents: Tensor, scale: float, first_step: int, start_frame: int, drawn: list[Tensor]) -> Tensor:
        """x0 of all rows."""
        self.noise.entry, self.noise.again = drawn[0], dict(enumerate(drawn[1:]))
        own = (first_step, *self.steps[1:])
        block, latent = 1 + self.count, self.first + self.count
        entering = Item(STREAM, 0, block, 0, 0, 1, latent, start_frame, scale, own, 0, 1)
        self.rows = [entering, *(None if row is None else row.next_step(row.step + 1) for row in self.rows[:-1])]
        batch: list[Item] = []
        for k, row in enumerate(self.rows):
            ops = (SlotOp(SlotOpKind.FORK, k, 0),) if self.count == 0 and k else ()
            batch.append(
                Item(STREAM, 0, block, k, k, 1, self.first, self.first, 0.0, self.steps, 0, 1, ops)
                if row is None
                else row
            )
        self.inputs = torch.cat([latents, self.inputs[:-1]])
        x0 = self.stage.run(batch, self.inputs)
        self.inputs = x0.clone()
        if len(batch) > 1:
            self.inputs[:-1] = self.stage.renoise(batch[:-1], x0[:-1])
        self.count += 1
        return x0


@torch.inference_mode()
def beside(
    path: Path,
    spec: ModelSpec,
    size: tuple[int, int],
    steps: int,
    ticks: int,
    dtype: torch.dtype = torch.float32,
    compiled: bool = False,
    words: int | None = None,
) -> Beside:
    """Time both on the CPU and compare what they compute. Raises PeerError."""
    warnings.filterwarnings("ignore", message=".*flash_attn is not installed.*")
    # diffusers warns on every cast of a model that is not its own.
    logging.getLogger("diffusers.models.modeling_utils").setLevel(logging.ERROR)
    modules = import_peer(path)
    weights = random_dit_weights(spec, range(spec.layers))
    peer = Peer(modules, spec, weights, dtype)
    shared = SharedNoise()
    latent = spec.latent_size(*size)
    prompt = torch.randn(spec.text_len, spec.text_dim)
    prompt[spec.text_len if words is None else words :] = 0
    stage = Stage.load(spec, weights, dtype=dtype, noise=shared, public_rule=True)
    reference = Reference(stage, shared, latent, prompt)
    own = Stage.load(spec, weights, dtype=dtype, speed=Speed.COMPILED if compiled else Speed.EAGER)
    own.tune(*latent, steps)
    served = LockStep(spec, [own], size, steps, prompt=prompt)

    own_steps = step_timesteps(spec.steps[0], spec.steps[:steps])
    noisy = torch.randn(1, 2, spec.latent_channels, *latent)
    peer.prepare(noisy, prompt, own_steps)
    worst = _far(peer.x0, reference.prepare(noisy, own_steps, peer.drawn))
    served.tick()

    device, scale, start = torch.device("cpu"), spec.noise.s0, 2
    rows: list[tuple[float, ...]] = []
    warm = spec.ring + steps + 2
    for _ in range(warm + ticks):
        start = spec.ring - 1 if spec.rope_refresh_at and start >= spec.rope_refresh_at else start
        x = torch.randn(1, 1, spec.latent_channels, *latent)
        marks = [time.process_time()]
        theirs, x0 = timed(device, partial(peer.tick, x, scale, own_steps[0], start))
        marks.append(time.process_time())
        ours = sum(served.tick(x))
        marks.append(time.process_time())
        same, ref = timed(device, partial(reference.tick, x, scale, own_steps[0], start, peer.drawn))
        worst = max(worst, _far(x0, ref))
        rows.append((theirs, ours, same, marks[1] - marks[0], marks[2] - marks[1]))
        start += 1
    columns = list(zip(*rows[warm:], strict=True))
    middle, least = [statistics.median(c) for c in columns], [min(c) for c in columns]
    return Beside(
        peer=middle[0],
        engine=middle[1],
        reference=middle[2],
        least_peer=least[0],
        least_engine=least[1],
        ratio=middle[0] / middle[1],
        least_ratio=least[0] / least[1],
        cpu_ratio=middle[3] / middle[4],
        same=worst,
        equal=worst <= TOLERANCE[str(dtype).removeprefix("torch.")],
        ticks=ticks,
    )


def _far(theirs: Tensor, ours: Tensor) -> float:
    return float((theirs.float() - ours.float()).abs().max())
