"""Trains rheo-tiny's text encoder: any way to ask for a style gives (nearly) the same vectors, each style its own.

``python -m training.train_text --run /tmp/rheo-run`` writes ``text.safetensors`` and ``text.csv``; a minute or two. Each
style has a fixed random code [text_len, text_dim]; a prompt's vectors are pulled to its style's code. The DiT is then
trained on the encoder's output for freely sampled prompts.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as fn

from shared.engine.model.text import TinyTextEncoder
from training.prompts import all_styles, sample_prompt
from training.runs import Curves, Progress, learning_rate, write_weights

PAGE = 12
"""Codes are drawn this many at a time, so that a style that joins leaves the codes of the others as they are."""


def style_codes(styles: int, text_len: int, text_dim: int, seed: int = 11) -> Tensor:
    """[styles, text_len, text_dim] with unit root mean square, half of it common to a style's vectors."""
    pages: list[Tensor] = []
    for page in range(-(-styles // PAGE)):
        generator = torch.Generator().manual_seed(seed + page)
        common = torch.randn(PAGE, 1, text_dim, generator=generator)
        pages.append(common + torch.randn(PAGE, text_len, text_dim, generator=generator))
    return fn.rms_norm(torch.cat(pages)[:styles], (text_dim,))


def nearest_code(vectors: Tensor, codes: Tensor) -> Tensor:
    """vectors [B, text_len, text_dim] → index [B] of the code with the least squared distance."""
    return (vectors[:, None] - codes[None]).square().mean((2, 3)).argmin(1)


def train(args: argparse.Namespace) -> None:
    """The whole run; short enough to be started anew instead of resumed."""
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    check = np.random.default_rng(args.seed + 1)
    names = all_styles()
    encoder = TinyTextEncoder()
    codes = style_codes(len(names), encoder.text_len, encoder.text_dim)
    optimiser = torch.optim.AdamW(encoder.parameters(), lr=args.lr, weight_decay=1e-3, betas=(0.9, 0.98))
    curves = Curves(args.run / "text.csv", resumed=False)
    progress = Progress(args.steps, 0)
    for step in range(1, args.steps + 1):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(progress.at(step), args.lr)
        wanted = rng.choice(len(names), 48, p=_shares(len(names)))
        vectors = encoder([sample_prompt(rng, names[i]) for i in wanted])
        target = torch.from_numpy(wanted)
        distance = (vectors[:, None] - codes[None]).square().mean((2, 3))
        loss = (vectors - codes[target]).square().mean() + 0.5 * fn.cross_entropy(-4 * distance, target)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
        optimiser.step()
        if step % args.report == 0 or step == args.steps:
            asked = check.choice(len(names), 240)
            with torch.no_grad():
                found = nearest_code(encoder([sample_prompt(check, names[i]) for i in asked]), codes)
            right = float((found == torch.from_numpy(asked)).float().mean())
            curves.add({"step": step, "seconds": progress.spent_s, "loss": loss.item(), "right": right})
    write_weights(args.run / "text.safetensors", encoder.state_dict())  # at the end only: a file says that it is done


def _shares(styles: int) -> np.ndarray:
    shares = np.ones(styles)
    shares[0] = 3.0
    return shares / shares.sum()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, default=Path("/tmp/rheo-run"))
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--report", type=int, default=100)
    parser.add_argument("--seed", type=int, default=5)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
