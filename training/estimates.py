"""What the DiT makes of clips, beside what it was to make: the decoder's other lesson.

``python -m training.estimates --pool /tmp/rheo-pool --model shared/models/rheo-tiny --out /tmp/rheo-run/estimates`` writes
``latents.npy`` float16 [clips, 8, C, h, w] (as the decoder gets them), ``pixels.npy`` uint8 [clips, 29, 3, H, W] (the true
filter's) and ``styles.npy``. An estimate is streamed as it is served: through noise, under the rolling cache, after one
step or two. What a cell lacks there, its neighbours often tell: a decoder that has seen it closes seams between cells.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from shared.engine.model.dit import Dit
from shared.engine.model.loading import load_tiny_vae
from shared.engine.model.text import TinyTextEncoder
from shared.engine.plan.spec import ModelSpec
from training.linear_encoder import measure
from training.pairs import PairSource
from training.prompts import all_styles, names_of
from training.runs import ClipPool
from training.train_dit import SIZES, Trainer, prompt_bank

HEIGHT, WIDTH, BATCH = SIZES[0]


@torch.no_grad()
def make(pool_file: Path, folder: Path, out: Path, clips: int, seed: int, often: tuple[str, ...] = ()) -> None:
    """Draws, filters and restyles ``clips`` clips; ``often``: styles to draw more often."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    spec = ModelSpec.from_json(folder / "spec.json")
    vae = load_tiny_vae(spec, folder)
    model = Dit(spec)
    model.load_state_dict({name: value.float() for name, value in load_file(folder / "dit.safetensors").items()})
    encoder = TinyTextEncoder.from_state(load_file(folder / "text.safetensors"))
    styles = all_styles()
    trainer = Trainer(model, vae, prompt_bank(encoder, styles, 150, seed), spec)
    pool = ClipPool(pool_file, rng)
    pairs_of = PairSource(measure(vae), pool, trainer.mean, trainer.scale, styles, often=often)
    out.mkdir(parents=True, exist_ok=True)
    (out / "styles.npy").unlink(missing_ok=True)
    shape = (spec.latent_channels, HEIGHT // 8, WIDTH // 8)
    latents = np.lib.format.open_memmap(out / "latents.npy", mode="w+", dtype=np.float16, shape=(clips, 8, *shape))
    pixels = np.lib.format.open_memmap(
        out / "pixels.npy", mode="w+", dtype=np.uint8, shape=(clips, 29, 3, HEIGHT, WIDTH)
    )
    kinds = np.zeros(clips, np.int64)
    for begin in range(0, clips, BATCH):
        pairs = pairs_of.draw(rng, min(BATCH, clips - begin), HEIGHT, WIDTH)
        made = trainer.served(rng, pairs) * trainer.scale.view(-1, 1, 1) + trainer.mean.view(-1, 1, 1)
        end = begin + len(pairs)
        latents[begin:end] = made.numpy().astype(np.float16)
        pixels[begin:end] = (torch.stack([p.pixels for p in pairs]) * 255).round().to(torch.uint8).numpy()
        kinds[begin:end] = [p.style for p in pairs]
        print(f"{end}/{clips} clips", flush=True)
    latents.flush()
    pixels.flush()
    np.save(out / "styles.npy", kinds)  # last: who reads a folder without it has one that was not finished


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pool", type=Path, default=Path("/tmp/rheo-pool"))
    parser.add_argument("--model", type=Path, default=Path("shared/models/rheo-tiny"), help="the model folder to ask")
    parser.add_argument("--out", type=Path, default=Path("/tmp/rheo-run/estimates"))
    parser.add_argument("--clips", type=int, default=600)
    parser.add_argument("--often", type=names_of, default=(), help="styles to draw more often, by commas")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=11)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    make(args.pool / "clips.npy", args.model, args.out, args.clips, args.seed, args.often)


if __name__ == "__main__":
    main()
