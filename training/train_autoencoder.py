"""Trains rheo-tiny's autoencoder on procedural clips and their filtered versions.

``python -m training.train_autoencoder --pool /tmp/rheo-pool --run /tmp/rheo-run`` writes ``vae.safetensors`` and
``latents.json`` (mean and standard deviation of every latent channel) to the run folder, with ``autoencoder.csv``.
A run that was stopped goes on from its last checkpoint.

The latents are held near unit power and get noise before they are decoded. So the encoder spreads what matters over its
channels, as a code for a noisy channel does: the DiT sees the latents through noise, and the decoder sees its errors.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from shared.engine.model.tiny_vae import MemBlock, TGrow, TinyVae, TPool
from training.filters import FILTERS, NO_STYLE, stylise
from training.pool import build_pool
from training.runs import ClipPool, Curves, MovingAverage, Progress, learning_rate, psnr, save_checkpoint, write_text, write_weights

WIDTHS, ENCODER_WIDTH = (96, 48, 16, 16), 16
SHAPES = ((4, 9, 128, 128), (4, 17, 96, 96), (2, 13, 128, 192))
STYLES = tuple(name for name in FILTERS if name != NO_STYLE)


@torch.no_grad()
def initialise(vae: TinyVae) -> None:
    """Keeps the signal's size through the ReLUs; each MemBlock starts near its skip; pictures start grey."""
    for module in vae.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for module in vae.modules():
        if isinstance(module, MemBlock):
            cast("nn.Conv2d", module.conv[4]).weight.mul_(0.2)
        elif isinstance(module, TPool | TGrow):
            module.conv.weight.mul_(0.7)
    last = cast("nn.Conv2d", vae.decoder[-1])
    last.weight.mul_(0.2)
    nn.init.constant_(cast("nn.Parameter", last.bias), 0.5)
    cast("nn.Conv2d", vae.encoder[-1]).weight.mul_(0.5)


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


def mixed_batch(pool: ClipPool, rng: np.random.Generator, shape: tuple[int, int, int, int]) -> Tensor:
    """Clips of which about 55 % show one of the styles."""
    video = pool.draw(*shape)
    for i in range(len(video)):
        if rng.random() < 0.55:
            video[i] = stylise(STYLES[rng.integers(len(STYLES))], video[i])
    return video


@torch.no_grad()
def evaluate(vae: TinyVae, clips: Tensor) -> dict[str, float]:
    """Decibels on held-out clips: as they are, styled, and as they are with noise of 0.3 in the latents."""
    pairs = {"plain_db": (clips, 0.0), "noisy_db": (clips, 0.3)}
    styled = torch.stack([stylise(STYLES[i % len(STYLES)], clip) for i, clip in enumerate(clips)])
    pairs["styled_db"] = (styled, 0.0)
    result = {}
    for name, (video, noise) in pairs.items():
        generator = torch.Generator().manual_seed(0)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            z = vae.encode_clip(video)
            z = z + noise * torch.randn(z.shape, generator=generator)
            result[name] = psnr(vae.decode_clip(z), video)
    return result


@torch.no_grad()
def latent_statistics(vae: TinyVae, pool: ClipPool, rng: np.random.Generator) -> dict[str, list[float]]:
    """Mean and standard deviation of each latent channel over plain and styled clips."""
    z = torch.cat([vae.encode_clip(mixed_batch(pool, rng, SHAPES[0])).flatten(0, 1) for _ in range(12)])
    return {"mean": z.mean((0, 2, 3)).tolist(), "std": z.std((0, 2, 3)).tolist()}


def train(args: argparse.Namespace) -> None:
    """The whole run."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    path = args.pool / "clips.npy"
    if not path.exists():
        path = build_pool(args.pool, 480, 29, 192, 320, 1, args.threads)
    vae = TinyVae(WIDTHS, ENCODER_WIDTH).to(memory_format=torch.channels_last)
    initialise(vae)
    optimiser = torch.optim.AdamW(vae.parameters(), lr=args.lr, weight_decay=1e-4, betas=(0.9, 0.98))
    average = MovingAverage(vae, 0.995)
    checkpoint = args.run / "autoencoder.pt"
    step, spent = 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=False)
        vae.load_state_dict(state["vae"])
        optimiser.load_state_dict(state["optimiser"])
        average.weights, average.steps = state["average"], state["step"]
        step, spent = state["step"], state["spent"]
    rng = np.random.default_rng([args.seed, step])
    pool = ClipPool(path, rng)
    curves = Curves(args.run / "autoencoder.csv", resumed=step > 0)
    progress = Progress(args.steps, args.minutes, spent)
    held_out = pool.validation(13)
    running = 0.0
    while progress.at(step) < 1:
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(progress.at(step), args.lr)
        video = mixed_batch(pool, rng, SHAPES[step % len(SHAPES)])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            z = vae.encode_clip(video)
            level = torch.rand(len(video), 1, 1, 1, 1) * 0.4 * (torch.rand(len(video), 1, 1, 1, 1) < 0.8)
            made = vae.decode_unclamped(z + level * torch.randn_like(z))
        z = z.float()
        power = z.square().mean((0, 1, 3, 4))
        loss = picture_loss(made.float(), video) + 0.02 * (power - 1).square().mean()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(vae.parameters(), 0.5)
        optimiser.step()
        average.update(vae)
        step += 1
        running = running * 0.97 + 0.03 * loss.item() if step > 1 else loss.item()
        if step % args.report == 0 or progress.at(step) >= 1:
            raw = {k: v.clone() for k, v in vae.state_dict().items()}
            vae.load_state_dict(average.weights)
            curves.add(
                {"step": step, "seconds": progress.spent_s, "loss": running, "grad": float(norm), "power": float(power.mean())}
                | evaluate(vae, held_out)
            )
            write_weights(args.run / "vae.safetensors", average.weights)
            stats = latent_statistics(vae, pool, rng)
            write_text(args.run / "latents.json", json.dumps(stats))
            vae.load_state_dict(raw)
            save_checkpoint(
                checkpoint,
                {"vae": raw, "optimiser": optimiser.state_dict(), "average": average.weights, "step": step, "spent": progress.spent_s},
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pool", type=Path, default=Path("/tmp/rheo-pool"))
    parser.add_argument("--run", type=Path, default=Path("/tmp/rheo-run"))
    parser.add_argument("--steps", type=int, default=20000)
    parser.add_argument("--minutes", type=float, default=0, help="end the schedule after this time if that is earlier")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--report", type=int, default=200)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=7)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
