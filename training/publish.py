"""Puts a run's weights together as a model folder: ``spec.json`` and three safetensors files in half precision."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from shared.engine.plan.spec import ModelSpec, spec_of
from training.runs import write_text, write_weights
from training.train_autoencoder import CHANNELS, WIDTHS


def tiny_spec(run: Path) -> ModelSpec:
    """rheo-tiny's spec with the run's latent statistics (``latents.json``)."""
    stats = json.loads((run / "latents.json").read_text())
    return replace(
        spec_of("rheo-tiny"),
        vae_widths=WIDTHS,
        vae_encoder_width=CHANNELS,
        latent_channels=CHANNELS,
        encoder_normalised=True,
        latent_scale=tuple(round(s, 6) for s in stats["scale"]),
        latent_shift=tuple(round(m, 6) for m in stats["mean"]),
    )


def publish(run: Path, folder: Path, mean_with: Path | None = None) -> None:
    """Writes every file atomically, the spec last; nothing where something is missing or does not fit.

    ``mean_with``: a model folder whose DiT this one went on from: the mean of the two is published, which errs less.
    Raises ValueError where the two have other tensors, or are for other latents.
    """
    spec = tiny_spec(run)
    if mean_with is not None:
        other = ModelSpec.from_json(mean_with / "spec.json")
        if (other.latent_scale, other.latent_shift) != (spec.latent_scale, spec.latent_shift):
            raise ValueError(
                f"{mean_with}: its DiT is for latents of another mean or scale: there is no mean of the two"
            )
    parts = {name: load_file(run / f"{name}.safetensors") for name in ("vae", "text", "dit")}
    if mean_with is not None:
        parts["dit"] = mean_of(parts["dit"], load_file(mean_with / "dit.safetensors"))
    for name, weights in parts.items():
        write_weights(folder / f"{name}.safetensors", {k: v.half() for k, v in weights.items()})
    write_text(folder / "spec.json", json.dumps(spec.to_dict(), indent=1) + "\n")


def mean_of(one: dict[str, Tensor], other: dict[str, Tensor]) -> dict[str, Tensor]:
    """The mean of two sets of weights, float32. Raises ValueError for other names or shapes."""
    if {name: t.shape for name, t in one.items()} != {name: t.shape for name, t in other.items()}:
        raise ValueError("two models with other tensors have no mean")
    return {name: torch.lerp(tensor.float(), other[name].float(), 0.5) for name, tensor in one.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, default=Path("/tmp/rheo-run"))
    parser.add_argument("--folder", type=Path, default=Path("shared/models/rheo-tiny"))
    parser.add_argument("--mean-with", type=Path, default=None, help="a model folder whose DiT the run's went on from")
    args = parser.parse_args()
    publish(args.run, args.folder, args.mean_with)


if __name__ == "__main__":
    main()
