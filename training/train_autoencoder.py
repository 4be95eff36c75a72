"""Fits rheo-tiny's encoder and trains its decoder, on procedural clips and their filtered versions.

``python -m training.train_autoencoder --pool /tmp/rheo-pool --run /tmp/rheo-run`` writes ``vae.safetensors`` and
``latents.json`` (mean and scale of every latent channel) to the run folder after a minute or two, then improves the decoder;
``autoencoder.csv`` holds the curve. A run that was stopped goes on from its last checkpoint. The DiT may be trained
meanwhile: from then on the encoder is fixed (:mod:`training.linear_encoder`), and so is the decoder's linear part.

The decoder gets its latents with noise, as much as the DiT's estimates may have. Its linear part is fitted at once
(:mod:`training.linear_decoder`) and stays; what is trained adds to it. ``--begin-with FOLDER`` takes a model's encoder and
goes on from its decoder. ``--estimates FOLDER`` lets it learn from the DiT's own estimates as well (:mod:`training.estimates`).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from shared.engine.model.tiny_vae import MemBlock, TGrow, TinyVae
from shared.engine.plan.spec import ModelSpec
from training.estimates_pool import Estimates
from training.fast_dit import autocast
from training.filters import FILTERS, NO_STYLE, stylise
from training.linear_decoder import start_decoder
from training.linear_encoder import SPREAD, LinearCode, amplitudes, fit, markov_clips, measure
from training.muon import Muon
from training.pool import build_pool
from training.runs import (
    ClipPool,
    Curves,
    MovingAverage,
    Progress,
    learning_rate,
    psnr,
    save_checkpoint,
    write_text,
    write_weights,
)

WIDTHS, CHANNELS = (96, 48, 16, 16), 48
"""The decoder's widths; the latents' channels, and as many the encoder's."""
SHAPES = ((4, 9, 96, 96), (2, 17, 96, 96), (3, 9, 96, 128))
LATENT_GAIN = 40.0
"""Root mean square of the latents that the DiT sees, where the noise has 1. More of the picture survives the same noise."""
NOISE_SHARE, STYLED_SHARE = 0.2, 0.45
ESTIMATED_SHARE = 0.5
"""Of the batches, once there are estimates."""
STYLES = tuple(name for name in FILTERS if name != NO_STYLE)


@torch.no_grad()
def initialise(vae: TinyVae) -> None:
    """Decoder: keeps the signal's size through the ReLUs; each MemBlock starts near its skip."""
    for module in vae.decoder.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for module in vae.decoder.modules():
        if isinstance(module, MemBlock):
            cast("nn.Conv2d", module.conv[4]).weight.mul_(0.2)
        elif isinstance(module, TGrow):
            module.conv.weight.mul_(0.7)
    cast("nn.Conv2d", vae.decoder[1]).weight.mul_(1 / SPREAD)
    last = cast("nn.Conv2d", vae.decoder[-1])
    last.weight.mul_(0.2)
    nn.init.zeros_(cast("nn.Parameter", last.bias))


def channels_last(vae: TinyVae) -> TinyVae:
    """The layout in which bfloat16 convs are fastest on a CPU."""
    for parameter in vae.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return vae


def slopes(x: Tensor) -> tuple[Tensor, Tensor]:
    """Differences to the right and lower neighbour."""
    return x[..., :, 1:] - x[..., :, :-1], x[..., 1:, :] - x[..., :-1, :]


def picture_loss(made: Tensor, true: Tensor) -> Tensor:
    """Squared and absolute error, and the error of the slopes, which keeps edges."""
    error = made - true
    loss = 4 * error.square().mean() + 0.5 * error.abs().mean()
    for a, b in zip(slopes(made), slopes(true), strict=True):
        loss = loss + 0.35 * (a - b).abs().mean()
    return loss


def _noise_clip(rng: np.random.Generator, shape: Sequence[int]) -> Tensor:
    """Noise [T, 3, H, W] of random grain and colours: every part of the code must be heard, not only what scenes use."""
    time, space, grey = float(rng.uniform(0.75, 0.97)), float(rng.uniform(0.8, 0.97)), float(rng.uniform(0.2, 0.95))
    clip = markov_clips((1, *shape), int(rng.integers(2**31)), time, space, grey)[0]
    strength, middle = rng.uniform(0.3, 1.2, (3, 1, 1)), rng.uniform(0.25, 0.75, (3, 1, 1))
    return ((clip - 0.5) * torch.from_numpy(strength).float() + torch.from_numpy(middle).float()).clamp(0, 1)


def mixed_batch(pool: ClipPool, rng: np.random.Generator, shape: tuple[int, int, int, int]) -> Tensor:
    """Clips of which about a half show one of the styles, and some are noise that no one drew (``markov_clips``)."""
    video = pool.draw(*shape)
    for i in range(len(video)):
        kind = rng.random()
        if kind < NOISE_SHARE:
            video[i] = _noise_clip(rng, video.shape[1:])
        elif kind < NOISE_SHARE + STYLED_SHARE:
            video[i] = stylise(STYLES[rng.integers(len(STYLES))], video[i])
    return video


@torch.no_grad()
def evaluate(vae: TinyVae, clips: Tensor, scale: Tensor) -> dict[str, float]:
    """Decibels on held-out clips: as they are, as they are with a twentieth of their size as noise, and styled."""
    styled = torch.stack([stylise(STYLES[i % len(STYLES)], clip) for i, clip in enumerate(clips)])
    result = {}
    for name, video, noise in (
        ("plain_db", clips, 0.0),
        ("noisy_db", clips, LATENT_GAIN / 20),
        ("styled_db", styled, 0.0),
    ):
        z = vae.encode_clip(video)
        z = z + noise * scale * torch.randn(z.shape, generator=torch.Generator().manual_seed(0))
        with autocast():
            result[name] = psnr(vae.decode_clip(z), video)
    return result


@torch.no_grad()
def restyled(vae: TinyVae, latents: Tensor, pixels: Tensor) -> dict[str, float]:
    """Decibels of estimates to what they were to be."""
    with autocast():
        return {"restyled_db": psnr(vae.decode_clip(latents), pixels)}


@torch.no_grad()
def noisy(z: Tensor, scale: Tensor) -> Tensor:
    """Latents [B, n, C, h, w], most clips' with as much noise as an estimate may have."""
    level = torch.rand(len(z), 1, 1, 1, 1) * 0.06 * LATENT_GAIN * (torch.rand(len(z), 1, 1, 1, 1) < 0.6)
    return z + level * scale * torch.randn_like(z)


def begin_decoder(vae: TinyVae, code: LinearCode, pool: ClipPool, rng: np.random.Generator, scale: Tensor) -> None:
    """The decoder's least-squares start."""
    clips = (mixed_batch(pool, rng, (2, 13, 128, 192)) for _ in range(60))
    start_decoder(vae, ((video, noisy(code.encode(video), scale)) for video in clips))


def fit_encoder(vae: TinyVae, pool: ClipPool, rng: np.random.Generator, run: Path) -> LinearCode:
    """Fits the encoder on mixed clips and writes the latents' statistics. One that is there already is kept."""
    if (run / "vae.safetensors").exists() and (run / "latents.json").exists():
        there = load_file(run / "vae.safetensors")
        vae.encoder.load_state_dict(
            {k.removeprefix("encoder."): v for k, v in there.items() if k.startswith("encoder.")}
        )
        return measure(vae)
    video = torch.cat([mixed_batch(pool, rng, (4, 8, 128, 192)) for _ in range(24)])
    fit(vae, torch.cat([video, markov_clips((16, *video.shape[1:]), 1)]))
    for parameter in vae.encoder.parameters():  # as it is published, so that training sees the code that is served
        parameter.data.copy_(parameter.data.half())
    code = measure(vae)
    mean, scale = amplitudes(vae, code, video[:, :5], LATENT_GAIN)
    write_text(run / "latents.json", json.dumps({"mean": mean, "scale": scale}))
    return code


def take_over(vae: TinyVae, folder: Path, run: Path) -> bool:
    """A model's encoder and decoder, and its latents' statistics for the run folder. Whether its shortcut came along."""
    spec = ModelSpec.from_json(folder / "spec.json")
    there = {name: value.float() for name, value in load_file(folder / "vae.safetensors").items()}
    vae.load_state_dict(there, strict=False)
    statistics = {"mean": list(spec.latent_shift), "scale": list(spec.latent_scale)}
    write_text(run / "latents.json", json.dumps(statistics))
    return "shortcut.weight" in there


def optimisers(vae: TinyVae, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the decoder's kernels, AdamW for biases and the last layer."""
    last = cast("nn.Conv2d", vae.decoder[-1]).weight
    kernels = [p for p in vae.decoder.parameters() if p.ndim > 1 and p is not last]
    known = {id(p) for p in kernels}
    others = [p for p in vae.decoder.parameters() if id(p) not in known]
    return [Muon(kernels, lr, weight_decay=1e-3), torch.optim.AdamW(others, lr=lr, weight_decay=0.0, betas=(0.9, 0.98))]


def train(args: argparse.Namespace) -> None:
    """The whole run."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    path = args.pool / "clips.npy"
    if not path.exists():
        path = build_pool(args.pool, 480, 29, 192, 320, 1, args.threads)
    checkpoint = args.run / "autoencoder.pt"
    state = torch.load(checkpoint, weights_only=True) if checkpoint.exists() else None
    step, spent = (state["step"], state["spent"]) if state else (0, 0.0)
    rng = np.random.default_rng([args.seed, step])
    pool = ClipPool(path, rng)
    vae = TinyVae(WIDTHS, CHANNELS, CHANNELS, shortcut=True)
    initialise(vae)
    goes_on = bool(args.begin_with and not state) and take_over(vae, args.begin_with, args.run)
    if state:
        vae.load_state_dict(state["vae"])
        code = measure(vae)
    else:
        code = measure(vae) if args.begin_with else fit_encoder(vae, pool, rng, args.run)
    scale = torch.tensor(json.loads((args.run / "latents.json").read_text())["scale"]).view(-1, 1, 1)
    if not state:
        if not goes_on:
            begin_decoder(vae, code, pool, rng, scale)
        write_weights(args.run / "vae.safetensors", vae.state_dict())  # whole now: the DiT may begin
    estimates = Estimates(args.estimates, rng) if args.estimates else None
    vae = channels_last(vae)
    vae.requires_grad_(False)
    vae.decoder.requires_grad_(True)
    optimiser = optimisers(vae, args.lr)
    average = MovingAverage(vae.decoder, 0.995)
    if state:
        for each, saved in zip(optimiser, state["optimiser"], strict=True):
            each.load_state_dict(saved)
        average.weights, average.steps = state["average"], state["step"]
    curves = Curves(args.run / "autoencoder.csv", resumed=step > 0)
    progress = Progress(args.steps, args.minutes, spent)
    held_out = pool.validation(9)[:, :, :, 32:160, 64:256]
    running = 0.0
    while progress.at(step) < 1:
        for each in optimiser:
            for group in each.param_groups:
                group["lr"] = learning_rate(progress.at(step), args.lr)
        shape = SHAPES[step % len(SHAPES)]
        if estimates is not None and rng.random() < ESTIMATED_SHARE:
            z, video = estimates.draw(*shape)
        else:
            video = mixed_batch(pool, rng, shape)
            z = noisy(code.encode(video), scale)
        with autocast():
            made = vae.decode_unclamped(z)
        loss = picture_loss(made.float(), video)
        for each in optimiser:
            each.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(vae.decoder.parameters(), 0.5)
        for each in optimiser:
            each.step()
        average.update(vae.decoder)
        step += 1
        running = running * 0.97 + 0.03 * loss.item() if step > 1 else loss.item()
        if step % args.report == 0 or progress.at(step) >= 1:
            raw = {k: v.clone() for k, v in vae.decoder.state_dict().items()}
            vae.decoder.load_state_dict(average.weights)
            curves.add(
                {"step": step, "seconds": progress.spent_s, "loss": running, "grad": norm.item()}
                | evaluate(vae, held_out, scale)
                | (restyled(vae, *estimates.held_out()) if estimates is not None else {})
            )
            write_weights(args.run / "vae.safetensors", vae.state_dict())
            vae.decoder.load_state_dict(raw)
            saved = {
                "vae": vae.state_dict(),
                "optimiser": [each.state_dict() for each in optimiser],
                "average": average.weights,
            }
            save_checkpoint(checkpoint, saved | {"step": step, "spent": progress.spent_s})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pool", type=Path, default=Path("/tmp/rheo-pool"))
    parser.add_argument("--run", type=Path, default=Path("/tmp/rheo-run"))
    parser.add_argument("--begin-with", type=Path, default=None, help="a model folder whose autoencoder to go on from")
    parser.add_argument(
        "--estimates", type=Path, default=None, help="a folder of the DiT's estimates to learn from, too"
    )
    parser.add_argument("--steps", type=int, default=20000)
    parser.add_argument("--minutes", type=float, default=0, help="end the schedule after this time if that is earlier")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--report", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=7)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
