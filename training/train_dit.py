"""Trains rheo-tiny's causal DiT to restyle video as it is served: in a stream, through noise, in 1…4 steps.

``python -m training.train_dit --pool /tmp/rheo-pool --run /tmp/rheo-run`` needs the autoencoder and the text encoder in the run
folder. It writes ``dit.safetensors`` and ``dit.csv``, publishes the whole model at every report if ``--publish`` is given, and
goes on from its last checkpoint when it was stopped.

Step 0 in every batch, a later step in every sixth. Step 0: the noisy *source* latents → the styled latents. A later step: the
model's own estimate, re-noised to that step's level → the styled latents; the source is out of sight there. The loss is on x0:
in latents, and now and then on decoded pixels against the true filter. Errors count by style (:mod:`training.style_weights`).

On two cores ``--processes 2`` is fastest (:mod:`training.side_by_side`).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from shared.engine.model.dit import Dit
from shared.engine.model.head import CELLS, PATHS
from shared.engine.model.text import TinyTextEncoder
from shared.engine.model.tiny_vae import TinyVae
from shared.engine.plan.spec import ModelSpec
from training.fast_dit import autocast, block_forward, compiled_block, predict, score_bias
from training.linear_encoder import LinearCode, measure
from training.linear_paths import start_paths
from training.muon import Muon
from training.pairs import Pair, PairSource
from training.prompts import all_styles, names_of, sample_prompt
from training.publish import publish, tiny_spec
from training.runs import ClipPool, Curves, MovingAverage, Progress, learning_rate, save_checkpoint, write_weights
from training.shelf import Shelf
from training.side_by_side import Fellows, side_by_side
from training.streaming_task import FIRST, Draw, draw_task, enter, frame_positions, look_back, sigmas
from training.style_weights import StyleWeights
from training.train_autoencoder import LATENT_GAIN, channels_last, picture_loss
from training.train_text import nearest_code, style_codes
from training.warm_start import NormalCode, begin_with

FRAMES = 8
STEADINESS = 0.5
USES, PLACES = 4, (150, 12)  # how often a couple of pairs is used, and how many wait to be used again, by size
BLENDS = 0.3  # of the pairs of one clip
PATH_CLIPS = 240
PACE_PAST = 0.2  # of the gated paths: what they are off by counts times x_t, which is loud
LATER_EVERY = 6  # steps: a later step changes little
LOUDNESS = LATENT_GAIN  # about the standard deviation of x_t (docs/adr/0032)
HEARD = LOUDNESS / 10.0  # errors are counted as if it were 10, which the shares of the loss's parts were chosen for
PACE_CELLS = 3.0  # of the MLP over cells, which is younger than the blocks
SIZES = ((96, 160, 4), (192, 320, 2))  # height, width, batch


def initialise(model: Dit) -> None:
    """Xavier for the blocks; small embeddings; a zero head, so that training starts from nothing."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if cast("nn.Parameter | None", module.bias) is not None:
                module.bias.data.zero_()
    nn.init.xavier_uniform_(model.patch_embedding.weight.flatten(1))
    cast("nn.Parameter", model.patch_embedding.bias).data.zero_()
    for part in (model.text_embedding, model.time_embedding):
        for layer in part:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.05)
    nn.init.normal_(cast("nn.Linear", model.time_projection[1]).weight, std=0.02)
    nn.init.zeros_(model.head.head.weight)
    if model.head.gated_paths:
        nn.init.zeros_(model.head.gates.weight)
        nn.init.zeros_(model.head.prompt_gates.weight)
    if model.head.cells is not None:
        nn.init.normal_(model.head.cells.near.weight, std=1 / (LOUDNESS * model.head.cells.near.in_features**0.5))
        nn.init.zeros_(model.head.cells.out.weight)


@dataclass(frozen=True)
class Prompts:
    """Each clip's prompt [B, len, dim], a second one, and the second one's share [B]: a blend under way."""

    own: Tensor
    other: Tensor
    share: Tensor

    def of(self, clips: list[int]) -> Prompts:
        """Those of some clips."""
        return Prompts(self.own[clips], self.other[clips], self.share[clips])


class Trainer:
    """The model with what one training step needs."""

    def __init__(self, model: Dit, vae: TinyVae, prompts: list[Tensor], spec: ModelSpec) -> None:
        self.model, self.vae, self.prompts, self.spec = model, vae, prompts, spec
        self._biases: dict[int, Tensor] = {}
        self._compiled, self._compiled_tokens = compiled_block(), SIZES[0][0] * SIZES[0][1] // 256
        self.mean, self.scale = torch.tensor(spec.latent_shift), torch.tensor(spec.latent_scale)
        self._pixels = pixels_of_latents(measure(vae), self.scale)
        self.weights = StyleWeights(len(prompts))

    def estimate(self, noisy: Tensor, times: Tensor, text: Prompts, positions: list[int], masked: bool) -> Tensor:
        """x0 of a clip or of a first block, [B, F, C, h, w]."""
        frames, tokens = noisy.shape[1], noisy.shape[-1] * noisy.shape[-2] // 4
        bias, block = None, block_forward
        if masked:
            block = self._compiled if tokens == self._compiled_tokens else block_forward
            if tokens not in self._biases:
                self._biases[tokens] = score_bias(look_back(frames, tokens, self.spec.ring, self.spec.sinks))
            bias = self._biases[tokens]
        sigma = sigmas(times, self.spec)
        other = text.other, text.share
        predicted = predict(self.model, noisy, times, sigma, text.own, positions[:frames], bias, block, other)
        return self.model.clean(noisy, sigma, predicted)

    def losses(
        self, rng: np.random.Generator, pairs: list[Pair], with_pixels: bool, with_later: bool
    ) -> tuple[Tensor, dict[str, float]]:
        """Total loss of one batch, and its parts."""
        source, target = torch.stack([p.source for p in pairs]), torch.stack([p.target for p in pairs])
        tasks = [draw_task(rng, self.spec, fewest=2 if with_later else 1) for _ in pairs]
        text, target = self._prompts(rng, pairs, target)
        positions = frame_positions(rng, FRAMES, self.spec.rope_refresh_at)
        noisy, times = self._entry(source, tasks, text, positions)
        x0 = self.estimate(noisy, times, text, positions, True)
        errors, squares = self._errors(x0, target)
        entry = self._weighed(errors, pairs)
        total = entry
        # A blend's error says nothing of its style.
        pure = [i for i, share in enumerate(text.share.tolist()) if share == 0]
        self.weights.note([pairs[i].style for i in pure], squares.detach()[pure])
        parts = {"entry": errors.mean().item(), "weighed": entry.item()}
        if with_pixels:
            pick = int(rng.choice(pure))
            pixel = self._pixel_loss(x0[pick : pick + 1, :4], pairs[pick]) * self.weights.of([pairs[pick].style])[0]
            total = total + 3.0 * pixel
            parts["pixel"] = pixel.item()
        if with_later:
            errors, _ = self._errors(self._later_step(x0.detach(), tasks, text, positions), target)
            later = self._weighed(errors, pairs)
            total = total + later
            parts["later"] = later.item()
        return total, parts

    @torch.no_grad()
    def start_paths(self, rng: np.random.Generator, draw: Callable[[], list[Pair]], clips: int) -> None:
        """Opens the gated paths as far as least squares can tell (:mod:`training.linear_paths`)."""

        def forward(pairs: list[Pair]) -> object:
            source = torch.stack([p.source for p in pairs])
            tasks = [draw_task(rng, self.spec) for _ in pairs]
            text, positions = self._plain_prompts(rng, pairs), frame_positions(rng, FRAMES, self.spec.rope_refresh_at)
            return self.estimate(*self._entry(source, tasks, text, positions), text, positions, True)

        start_paths(self.model, self.prompts, draw, forward, clips)

    def _plain_prompts(self, rng: np.random.Generator, pairs: list[Pair]) -> Prompts:
        own = torch.stack([self.prompts[p.style][rng.integers(len(self.prompts[p.style]))] for p in pairs])
        return Prompts(own, own, torch.zeros(len(pairs)))

    @torch.no_grad()
    def served(self, rng: np.random.Generator, pairs: list[Pair]) -> Tensor:
        """Estimates [B, 8, C, h, w] as a stream's user gets them, after one step or two, with no prompt under way."""
        source, steps = torch.stack([p.source for p in pairs]), int(rng.integers(1, 3))
        tasks = [draw_task(rng, self.spec, exactly=steps) for _ in pairs]
        text = self._plain_prompts(rng, pairs)
        positions = frame_positions(rng, FRAMES, self.spec.rope_refresh_at)
        noisy, times = self._entry(source, tasks, text, positions)
        x0 = self.estimate(noisy, times, text, positions, True)
        return self._later_step(x0, tasks, text, positions) if steps > 1 else x0

    def _entry(self, source: Tensor, tasks: list[Draw], text: Prompts, positions: list[int]) -> tuple[Tensor, Tensor]:
        """What step 0 gets, and its timesteps: a clip whose first block is at the last of its steps already."""
        first = self._first_block(source, tasks, text, positions)
        s = torch.tensor([t.noise_scale for t in tasks])
        noisy = enter(source, s, torch.randn_like(source))
        noisy[:, :FIRST] = first
        times = [[t.timesteps[-1]] * FIRST + [t.timesteps[0]] * (FRAMES - FIRST) for t in tasks]
        return noisy, torch.tensor(times, dtype=torch.float32)

    def _prompts(self, rng: np.random.Generator, pairs: list[Pair], target: Tensor) -> tuple[Prompts, Tensor]:
        """A prompt for each clip. Of two styles of one clip the first may fade into the second, and so does its target."""
        own = torch.stack([self.prompts[p.style][rng.integers(len(self.prompts[p.style]))] for p in pairs])
        other, share, target = own.clone(), torch.zeros(len(pairs)), target.clone()
        for first in range(0, len(pairs) - 1, 2):
            if rng.random() < BLENDS:
                share[first] = rng.uniform(0.1, 0.9)
                other[first] = own[first + 1]
                target[first] = torch.lerp(target[first], target[first + 1], share[first])
        return Prompts(own, other, share), target

    def _weighed(self, errors: Tensor, pairs: list[Pair]) -> Tensor:
        return (errors * self.weights.of([p.style for p in pairs])).mean()

    def _errors(self, made: Tensor, true: Tensor) -> tuple[Tensor, Tensor]:
        """Errors [B] and, of each, the squares [B].

        Mostly what the error in latents does to pixels; of the latents themselves as well, so that detail counts.
        """
        error = (made - true) / HEARD
        pixels = torch.einsum("tpc,bfchw->bftphw", self._pixels, error).flatten(1, 2)
        # An error that stays is a tint, one that changes from picture to picture is flicker: that one counts again.
        change = pixels[:, 1:] - pixels[:, :-1]
        cells = error.shape[1] * error.shape[-1] * error.shape[-2]
        squares = pixels.square().flatten(1).sum(1) / cells
        changes = change.square().flatten(1).sum(1) / cells
        return 0.5 * squares + 0.5 * STEADINESS * changes + 0.1 * error.abs().flatten(1).mean(1), squares

    @torch.no_grad()
    def _first_block(self, source: Tensor, tasks: list[Draw], text: Prompts, positions: list[int]) -> Tensor:
        """The first block as the last of its steps sees it."""
        s = torch.tensor([t.noise_scale for t in tasks])
        start = source[:, :FIRST]
        noisy = enter(start, s, torch.randn_like(start))
        done = [i for i, t in enumerate(tasks) if t.steps > 1]
        if done:
            times = torch.tensor([[tasks[i].timesteps[0]] * FIRST for i in done], dtype=torch.float32)
            x0 = self.estimate(noisy[done], times, text.of(done), positions, False)
            noisy[done] = self._renoise(x0, torch.tensor([[tasks[i].timesteps[-1]] * FIRST for i in done]))
        return noisy

    def _later_step(self, x0: Tensor, tasks: list[Draw], text: Prompts, positions: list[int]) -> Tensor:
        times = torch.tensor(
            [[t.timesteps[-1]] * FIRST + [t.timesteps[t.step]] * (FRAMES - FIRST) for t in tasks], dtype=torch.float32
        )
        return self.estimate(self._renoise(x0, times), times, text, positions, True)

    def _renoise(self, x0: Tensor, times: Tensor) -> Tensor:
        sigma = sigmas(times, self.spec)
        return (1 - sigma) * x0 + sigma * torch.randn_like(x0)

    def _pixel_loss(self, x0: Tensor, pair: Pair) -> Tensor:
        z = x0 * self.scale.view(-1, 1, 1) + self.mean.view(-1, 1, 1)
        with autocast():
            made = self.vae.decode_unclamped(z)
        return picture_loss(made.float(), pair.pixels[None, : made.shape[1]])


def pixels_of_latents(code: LinearCode, scale: Tensor) -> Tensor:
    """[4, 192, C]: what an error of one in a scaled latent does to a cell's pixels, frame by frame.

    The linear way back of each cell by itself, so scaled that independent errors of one in every latent have a square of one.
    """
    back = torch.linalg.pinv(code.matrix.double()).float() * scale
    return (back / back.square().sum().sqrt()).unflatten(0, (4, -1))


@torch.no_grad()
def prompt_bank(encoder: TinyTextEncoder, styles: tuple[str, ...], each: int, seed: int) -> list[Tensor]:
    """Per style, embeddings of about ``each`` sampled prompts [n, text_len, text_dim]; misread ones are left out."""
    rng = np.random.default_rng(seed)
    codes = style_codes(len(styles), encoder.text_len, encoder.text_dim)
    bank = []
    for index, style in enumerate(styles):
        vectors = encoder([sample_prompt(rng, style) for _ in range(each)])
        bank.append(torch.cat([vectors[nearest_code(vectors, codes) == index], codes[index : index + 1]]))
    return bank


def optimisers(model: Dit, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices in the middle, AdamW for all else; each group's ``pace`` multiplies the learning rate."""
    matrices = [p for n, p in model.named_parameters() if n.startswith("blocks.") and p.ndim == 2]
    cells = [p for n, p in model.named_parameters() if n.startswith(CELLS) and p.ndim == 2]
    past = [p for n, p in model.named_parameters() if n.startswith(PATHS)]
    known = {id(p) for p in matrices + cells + past}
    others = [p for p in model.parameters() if id(p) not in known]
    groups = [{"params": others, "pace": 1.0}, {"params": past, "pace": PACE_PAST}]
    steep = [{"params": matrices, "pace": 1.0}, {"params": cells, "pace": PACE_CELLS}]
    muon, adam = Muon(steep, lr, weight_decay=0.01), torch.optim.AdamW(groups, lr, (0.9, 0.98), weight_decay=0.0)
    return [muon, adam]


def train(args: argparse.Namespace, fellows: Fellows) -> None:
    """The whole run, as one of ``fellows``."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    spec = tiny_spec(args.run)
    vae = TinyVae(spec.vae_widths, spec.vae_encoder_width, spec.latent_channels, spec.vae_shortcut)
    vae.load_state_dict(load_file(args.run / "vae.safetensors"))
    vae = channels_last(vae)
    vae.requires_grad_(False)
    styles = all_styles()
    encoder = TinyTextEncoder.from_state(load_file(args.run / "text.safetensors"))
    model = Dit(spec)
    initialise(model)
    trainer = Trainer(model, vae, prompt_bank(encoder, styles, 150, args.seed), spec)
    optimiser = optimisers(model, args.lr)
    average = MovingAverage(model, 0.99)
    checkpoint = args.run / "dit.pt"
    step, spent = 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        for each, saved in zip(optimiser, state["optimiser"], strict=True):
            each.load_state_dict(saved)
        average.weights, average.steps = state["average"], state["step"]
        trainer.weights.errors = state["errors"]
        step, spent = state["step"], state["spent"]
    rng = np.random.default_rng([args.seed, step, fellows.rank])
    pool = ClipPool(args.pool / "clips.npy", rng)
    code = measure(vae)
    pairs_of = PairSource(code, pool, trainer.mean, trainer.scale, styles, often=args.often)
    shelves = [
        Shelf(lambda couples, h=h, w=w: pairs_of.draw(rng, 2 * couples, h, w), places, USES)
        for (h, w, _), places in zip(SIZES, PLACES, strict=True)
    ]
    if args.begin_with and not step:
        clips = pool.draw(24, 13, 96, 160)
        paths = begin_with(model, NormalCode(code, trainer.mean, trainer.scale), args.begin_with, clips)
        if fellows.first and model.head.gated_paths and not paths:
            trainer.start_paths(rng, lambda: pairs_of.draw(rng, 6, *SIZES[0][:2]), PATH_CLIPS)
    fellows.begin_alike(model)
    if not step:
        average = MovingAverage(model, 0.99)
    torch.manual_seed(args.seed + step + 1_000_003 * fellows.rank)
    progress = Progress(args.steps, args.minutes, spent)
    done = progress.at(step)
    curves = Curves(args.run / "dit.csv", resumed=step > 0) if fellows.first else None
    running: dict[str, float] = {}
    while done < 1:
        for each in optimiser:
            for group in each.param_groups:
                group["lr"] = learning_rate(done, args.lr) * group.get("pace", 1.0)
        which = 1 if done > args.large_from and step % 12 == 11 else 0
        loss, parts = trainer.losses(
            rng,
            shelves[which].take(rng, SIZES[which][2] // 2),
            with_pixels=which == 0 and step % 3 == 0 and done > args.pixels_from,
            with_later=step % LATER_EVERY == 1,
        )
        for each in optimiser:
            each.zero_grad(set_to_none=True)
        loss.backward()
        done = fellows.agree(model.parameters(), progress.at(step + 1))
        trainer.weights.errors = fellows.mean_known(trainer.weights.errors)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for each in optimiser:
            each.step()
        average.update(model)
        step += 1
        for key, value in (parts | {"grad": norm.item()}).items():
            running[key] = running.get(key, value) * 0.95 + 0.05 * value
        if curves is not None and (step % args.report == 0 or done >= 1):
            curves.add(
                {"step": step, "seconds": progress.spent_s}
                | {k: running.get(k, 0.0) for k in ("entry", "weighed", "later", "pixel", "grad")}
                | {name: float(error) for name, error in zip(styles, trainer.weights.errors, strict=True)}
            )
            write_weights(args.run / "dit.safetensors", average.weights)
            if args.publish:
                publish(args.run, args.publish)
            saved = {"model": model.state_dict(), "optimiser": [each.state_dict() for each in optimiser]}
            saved |= {"average": average.weights, "errors": trainer.weights.errors}
            save_checkpoint(checkpoint, saved | {"step": step, "spent": progress.spent_s})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pool", type=Path, default=Path("/tmp/rheo-pool"))
    parser.add_argument("--run", type=Path, default=Path("/tmp/rheo-run"))
    parser.add_argument("--publish", type=Path, default=None, help="model folder to write at every report")
    parser.add_argument("--begin-with", type=Path, default=None, help="a model folder whose DiT to go on from")
    parser.add_argument("--steps", type=int, default=20000)
    parser.add_argument("--minutes", type=float, default=0, help="end the schedule after this time if that is earlier")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument(
        "--large-from", type=float, default=0.6, help="share of the run after which full-size clips join"
    )
    parser.add_argument("--pixels-from", type=float, default=0.4, help="share of the run after which pixels count too")
    parser.add_argument("--often", type=names_of, default=(), help="styles to draw more often, by commas")
    parser.add_argument("--report", type=int, default=100)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--processes", type=int, default=1, help="each of this many processes has its own batch")
    args = parser.parse_args()
    side_by_side(args.processes, train, args)


if __name__ == "__main__":
    main()
