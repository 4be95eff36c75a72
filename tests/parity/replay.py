"""Replay recorded streams of the public StreamDiffusionV2 model through the engine's own stage and autoencoders.

``python tests/parity/replay.py FILE…`` prints one JSON line per file and exits 1 if any error is above 1e-4.
"""

from __future__ import annotations

import itertools
import json
import math
import sys
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from shared.engine.model.loading import load_tiny_vae, load_vae
from shared.engine.model.tiny_vae_serving import ServingTinyVae
from shared.engine.model.wan_vae import WanVae
from shared.engine.plan.items import Item, SlotOp, SlotOpKind
from shared.engine.plan.spec import ModelSpec, spec_of
from shared.engine.stage import Stage

TOLERANCE = 1e-4
STREAM = "recorded"


@dataclass(frozen=True)
class Recording:
    """One file: its settings and tensors."""

    path: Path
    settings: dict[str, Any]
    tensors: dict[str, Tensor]

    @classmethod
    def read(cls, path: Path) -> Recording:
        with safe_open(path, framework="pt") as file:
            settings = {key: json.loads(value) for key, value in file.metadata().items()}
            return cls(path, settings, {key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118

    @property
    def kind(self) -> str:
        if "first.input" in self.tensors:
            return "dit"
        return "taehv" if "keys" in self.settings else "wan_vae"

    @property
    def weights(self) -> dict[str, Tensor]:
        return {n.removeprefix("model."): t for n, t in self.tensors.items() if n.startswith("model.")}


class RecordedNoise:
    """A NoiseSource that hands out the ε of a recording; entry noise is already in the recorded inputs."""

    def __init__(self) -> None:
        self.by_step: dict[int, Tensor] = {}

    def draw(self, items: Sequence[Item], step_offset: int, shape: tuple[int, int, int]) -> Tensor:
        if step_offset == 0:
            return torch.zeros(len(items), items[0].frames, *shape)
        return torch.stack([self.by_step[item.step].reshape(items[0].frames, *shape) for item in items])


def dit_spec(settings: dict[str, Any]) -> ModelSpec:
    """The ModelSpec a recording was made with."""
    threshold = settings["adapt_sink_threshold"]
    return replace(
        spec_of("nano"),
        name=settings["name"],
        dim=settings["dim"],
        ffn_dim=settings["ffn_dim"],
        layers=settings["num_layers"],
        heads=settings["num_heads"],
        freq_dim=settings["freq_dim"],
        text_dim=settings["text_dim"],
        text_len=settings["text_len"],
        ring=settings["num_kv_cache"],
        sinks=settings["num_sink_tokens"],
        sink_threshold=None if threshold < 0 else threshold,
        rope_refresh_at=settings["rope_refresh_at"],
        rerotate=False,
        sigma_shift=settings["shift"],
        steps=tuple(settings["denoising_steps"]),
    )


class Pipe:
    """The stages one after the other: what a pipeline of workers does with one batch."""

    def __init__(self, recording: Recording, cuts: Sequence[int] = (), device: str = "cpu") -> None:
        self.spec = dit_spec(recording.settings)
        self.noise = RecordedNoise()
        edges = [0, *cuts, self.spec.layers]
        self.stages = [
            Stage.load(self.spec, recording.weights, range(a, b), device, noise=self.noise, public_rule=True)
            for a, b in itertools.pairwise(edges)
        ]
        for stage in self.stages:
            stage.open(STREAM, recording.settings["latent_height"], recording.settings["latent_width"])
            stage.set_prompt(STREAM, 1, recording.tensors["prompt_embeds"][0])

    def run(self, items: Sequence[Item], x: Tensor) -> Tensor:
        for stage in self.stages:
            x = stage.run(items, x)
        return x

    def renoise(self, items: Sequence[Item], x0: Tensor) -> Tensor:
        return self.stages[-1].renoise(items, x0)


def replay_dit(recording: Recording, cuts: Sequence[int] = (), device: str = "cpu") -> Iterator[float]:
    """The errors of the first chunk and of every tick, in order."""
    data, steps = recording.tensors, tuple(recording.settings["denoising_steps"])
    pipe = Pipe(recording, cuts, device)
    frames = recording.settings["num_frame_per_block"]

    item = Item(STREAM, 0, 0, 0, 0, 1 + frames, 0, 0, 0.0, steps, 0, 1, (SlotOp(SlotOpKind.RESET, 0),))
    x = data["first.input"]
    for step in range(len(steps)):
        x0 = pipe.run([item], x)
        if step + 1 < len(steps):
            pipe.noise.by_step = {step: data[f"first.renoise.{step}"]}
            x = pipe.renoise([item], x0)
            item = item.next_step(0, (SlotOp(SlotOpKind.RESET, 0),))
    yield _error(x0, data["first.output"])

    # The public code's lock step: the block of tick t stands in row i at tick t + i. Rows not yet reached run all the
    # same, on what zeros have become.
    rows: list[Item | None] = [None] * len(steps)
    shape = data["chunk.000.input"].shape[1:]
    inputs = torch.zeros(len(steps), *shape)
    for tick in range(recording.settings["chunks"]):
        first = 1 + frames + tick * frames
        own_steps = (int(data["first_timestep"][tick]), *steps[1:])
        entering = Item(STREAM, 0, 1 + tick, 0, 0, frames, first, int(data["start_frame"][tick]), 0.0, own_steps, 0, 1)
        rows = [entering, *(None if row is None else row.next_step(row.step + 1) for row in rows[:-1])]
        idle = replace(entering, start_frame=1 + frames, first_latent=1 + frames, timesteps=steps)
        batch = [replace(idle, step=i, slot=i) if row is None else row for i, row in enumerate(rows)]
        if tick == 0:
            # Every slot starts as a copy of the first chunk's.
            batch[1:] = [replace(item, ops=(SlotOp(SlotOpKind.FORK, item.slot, 0),)) for item in batch[1:]]
        inputs = torch.cat([data[f"chunk.{tick:03d}.input"], inputs[:-1]])
        x0 = pipe.run(batch, inputs)
        out = x0.clone()
        if len(steps) > 1:
            pipe.noise.by_step = {i: data[f"chunk.{tick:03d}.renoise.{i}"] for i in range(len(steps) - 1)}
            out[:-1] = pipe.renoise(batch[:-1], x0[:-1])
        yield _error(out, data[f"chunk.{tick:03d}.output"])
        inputs = out


def taehv_weights(settings: dict[str, Any]) -> dict[str, Tensor]:
    """The recording's weights, made from its formula."""
    weights: dict[str, Tensor] = {}
    for name, shape in settings["keys"].items():
        random = np.random.RandomState((zlib.crc32(name.encode()) + settings["seed"]) % 2**32)
        scale = np.sqrt(1.4 / np.prod(shape[1:])) if len(shape) > 1 else 0.02
        weights[name] = torch.from_numpy((random.standard_normal(shape) * scale).astype(np.float32))
    weights["decoder.22.weight"] *= 0.15
    weights["decoder.22.bias"] += 0.5
    return weights


def replay_taehv(recording: Recording) -> Iterator[float]:
    """Whole clip and streamed, both directions, as a module and rearranged for serving."""
    data = recording.tensors
    spec, weights = replace(spec_of("wan2.1-1.3b"), vae="taehv"), taehv_weights(recording.settings)
    whole = load_tiny_vae(spec, weights)
    with torch.inference_mode():
        yield _error(whole.encode_clip(data["video"]), data["latents"])
        yield _error(whole.decode_clip(data["decode.latents"]), data["decode.video"])
        serving = load_vae(spec, weights)
        assert isinstance(serving, ServingTinyVae)
        for vae in (whole, serving):
            memory = vae.new_memory()
            parts = [vae.encode(memory, part) for part in data["video"][0].split(4)]
            yield _error(torch.cat(parts)[None], data["latents"])
            memory = vae.new_memory()
            parts = [vae.decode(memory, part) for part in data["decode.latents"][0].split([2, 1, 1])]
            yield _error(torch.cat(parts)[None], data["decode.video"])


def replay_wan_vae(recording: Recording) -> Iterator[float]:
    """Chunks as they stream, and the whole clip in one call; the decoder's input is z·std + mean."""
    data = recording.tensors
    vae = load_vae(replace(spec_of("wan2.1-1.3b"), vae="wan"), recording.weights)
    assert isinstance(vae, WanVae)
    frames = (data["video"][0].transpose(0, 1) + 1) / 2
    raw = data["decode.latents"][0] * data["scale.std"][:, None, None, None] + data["scale.mean"][:, None, None, None]
    for kind, chunks, latents in (("whole", [17], [5]), ("streamed", [5, 4, 4, 4], [2, 1, 1, 1])):
        memory = vae.new_memory()
        made = torch.cat([vae.encode(memory, part) for part in frames.split(chunks)])
        yield _error(made.transpose(0, 1)[None], data[f"latents.{kind}"])
        memory = vae.new_memory()
        shown = torch.cat([vae.decode_unclamped(memory, part) for part in raw.transpose(0, 1).split(latents)])
        yield _error(shown.transpose(0, 1)[None], data[f"video.{kind}"])


def replay(path: Path) -> tuple[str, list[float]]:
    """(kind, error per tick) of one file."""
    recording = Recording.read(path)
    replays = {"dit": replay_dit, "taehv": replay_taehv, "wan_vae": replay_wan_vae}
    return recording.kind, list(replays[recording.kind](recording))


def _error(ours: Tensor, recorded: Tensor) -> float:
    assert ours.numel() == recorded.numel(), f"{tuple(ours.shape)} against {tuple(recorded.shape)}"
    return float((ours.cpu().reshape(recorded.shape) - recorded).abs().max())


def worst_of(errors: Sequence[float]) -> float:
    """The largest error; NaN if there is one, or none at all: max() would let it pass."""
    return max(errors) if errors and not any(math.isnan(error) for error in errors) else math.nan


def main(paths: Sequence[str]) -> int:
    """Replay every file; 1 if one is off by more than the tolerance."""
    worst: list[float] = []
    for name in paths:
        kind, errors = replay(Path(name))
        worst.append(worst_of(errors))
        # JSON has no NaN: a replay that went wrong says null.
        shown = None if math.isnan(worst[-1]) else worst[-1]
        print(
            json.dumps({"file": Path(name).name, "kind": kind, "ticks": len(errors), "max_abs_error": shown}),
            flush=True,
        )
    return int(not worst_of(worst) <= TOLERANCE)


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main(sys.argv[1:]))
