"""Trains rheo-tiny's last layer alone (:class:`shared.engine.model.head.Head`), behind blocks that stay as they are.

``python -m training.train_head --pool /tmp/rheo-pool --run /tmp/rheo-run --begin-with shared/models/rheo-tiny``. The blocks
make lessons, without gradients: what the head gets of a clip, and what it should give. Each lesson is used several times, so
that a use costs a fifth of one in :mod:`training.train_dit`. What a style does to fine detail is learned in the head, whose
MLP over cells is younger than the blocks (docs/adr/0029). The tasks and the errors are those of ``train_dit``, and so is what
the run folder must hold; it writes that run's ``dit.safetensors``, and ``head.csv`` and ``head.pt``.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from shared.engine.model.dit import Dit, unpatchify
from shared.engine.model.text import TinyTextEncoder
from shared.engine.model.tiny_vae import TinyVae
from training.fast_dit import autocast
from training.linear_encoder import measure
from training.pairs import Pair, PairSource
from training.prompts import all_styles, names_of
from training.publish import tiny_spec
from training.runs import ClipPool, Curves, MovingAverage, Progress, learning_rate, save_checkpoint, write_weights
from training.shelf import Shelf
from training.side_by_side import Fellows, side_by_side
from training.streaming_task import draw_task, frame_positions
from training.train_dit import FRAMES, LATER_EVERY, SIZES, Trainer, optimisers, prompt_bank
from training.warm_start import NormalCode, begin_with

HEIGHT, WIDTH, _ = SIZES[0]
COUPLES, USES, PLACES = 3, 4, 100  # lessons a step, how often each is used, how many wait: in couples


@dataclass(frozen=True)
class Lesson:
    """One clip at one step: x [L, dim], e [F, dim], x_t [F, C, h, w], σ [F, 1, 1, 1], the prompt's keys and values
    [M, heads, D], and the true latents [F, C, h, w]. ``style`` −1: two prompts are mixed."""

    x: Tensor
    e: Tensor
    noisy: Tensor
    sigma: Tensor
    keys: Tensor
    values: Tensor
    target: Tensor
    style: int


class HeadTrainer(Trainer):
    """A trainer whose blocks make lessons for its head."""

    def watch(self) -> None:
        """Note what the head gets from now on."""
        self._seen: tuple[Any, ...] = ()

        def note(_: object, given: tuple[Any, ...]) -> None:
            self._seen = given

        self.model.head.register_forward_pre_hook(note)

    @torch.no_grad()
    def lessons(self, rng: np.random.Generator, pairs: list[Pair]) -> list[Lesson]:
        """One lesson per pair: of a first step mostly, of a later one now and then."""
        source, target = torch.stack([p.source for p in pairs]), torch.stack([p.target for p in pairs])
        later = rng.random() < 1 / LATER_EVERY
        tasks = [draw_task(rng, self.spec, fewest=2 if later else 1) for _ in pairs]
        text, target = self._prompts(rng, pairs, target)
        positions = frame_positions(rng, FRAMES, self.spec.rope_refresh_at)
        x0 = self.estimate(*self._entry(source, tasks, text, positions), text, positions, True)
        if later:
            self._later_step(x0, tasks, text, positions)
        x, e, noisy, sigma, (keys, values), *_ = self._seen
        styles = [-1 if share else p.style for p, share in zip(pairs, text.share.tolist(), strict=True)]
        rows = zip(x, e, noisy, sigma, keys, values, target, styles, strict=True)
        return [Lesson(*(part.clone() for part in row[:-1]), style=row[-1]) for row in rows]

    def lesson_loss(self, lessons: list[Lesson]) -> tuple[Tensor, dict[str, float]]:
        """The weighed error of the head on these, and its parts."""
        x, e, noisy, sigma, keys, values, target = (
            torch.stack([getattr(lesson, name) for lesson in lessons])
            for name in ("x", "e", "noisy", "sigma", "keys", "values", "target")
        )
        with autocast():
            made = self.model.head(x, e, noisy, sigma, (keys, values))
        x0 = self.model.clean(noisy, sigma, unpatchify(made, noisy.shape[-2] // 2, noisy.shape[-1] // 2))
        errors, squares = self._errors(x0, target)
        pure = [i for i, lesson in enumerate(lessons) if lesson.style >= 0]
        self.weights.note([lessons[i].style for i in pure], squares.detach()[pure])
        # A mix of two styles counts like the average style.
        shares = self.weights.of([max(0, lesson.style) for lesson in lessons])
        shares = torch.where(torch.tensor([lesson.style >= 0 for lesson in lessons]), shares, torch.ones(()))
        loss = (errors * shares).mean()
        return loss, {"entry": errors.mean().item(), "weighed": loss.item()}


def head_only(model: Dit, lr: float) -> list[torch.optim.Optimizer]:
    """The optimisers of :func:`training.train_dit.optimisers`, for the head's parameters only; the others are frozen."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("head."))
    chosen = optimisers(model, lr)
    for optimiser in chosen:
        for group in optimiser.param_groups:
            group["params"] = [p for p in group["params"] if p.requires_grad]
        optimiser.param_groups = [group for group in optimiser.param_groups if group["params"]]
    return chosen


def train(args: argparse.Namespace, fellows: Fellows) -> None:
    """The whole run, as one of ``fellows``."""
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    spec, styles = tiny_spec(args.run), all_styles()
    vae = TinyVae(spec.vae_widths, spec.vae_encoder_width, spec.latent_channels, spec.vae_shortcut)
    vae.load_state_dict(load_file(args.run / "vae.safetensors"))
    vae.requires_grad_(False)
    encoder = TinyTextEncoder.from_state(load_file(args.run / "text.safetensors"))
    model, code = Dit(spec), measure(vae)
    trainer = HeadTrainer(model, vae, prompt_bank(encoder, styles, 150, args.seed), spec)
    rng = np.random.default_rng([args.seed, fellows.rank])
    checkpoint, step, spent = args.run / "head.pt", 0, 0.0
    pool = ClipPool(args.pool / "clips.npy", rng)
    clips = pool.draw(24, 13, HEIGHT, WIDTH)
    if not begin_with(model, NormalCode(code, trainer.mean, trainer.scale), args.begin_with, clips):
        raise SystemExit(f"{args.begin_with}: its head was made for another autoencoder; train the whole DiT first")
    fellows.begin_alike(model)
    trainer.watch()
    optimiser, average = head_only(model, args.lr), MovingAverage(model, 0.99)
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        for each, saved in zip(optimiser, state["optimiser"], strict=True):
            each.load_state_dict(saved)
        average.weights, average.steps, trainer.weights.errors = state["average"], state["step"], state["errors"]
        step, spent = state["step"], state["spent"]
        rng.bit_generator.state = np.random.default_rng([args.seed, step, fellows.rank]).bit_generator.state
    pairs_of = PairSource(code, pool, trainer.mean, trainer.scale, styles, often=args.often)
    shelf: Shelf[Lesson] = Shelf(
        lambda couples: trainer.lessons(rng, pairs_of.draw(rng, 2 * couples, HEIGHT, WIDTH)), PLACES, USES
    )
    torch.manual_seed(args.seed + step + 1_000_003 * fellows.rank)
    progress = Progress(args.steps, args.minutes, spent)
    curves = Curves(args.run / "head.csv", resumed=step > 0) if fellows.first else None
    running: dict[str, float] = {}
    done = progress.at(step)
    while done < 1:
        for each in optimiser:
            for group in each.param_groups:
                group["lr"] = learning_rate(done, args.lr) * group.get("pace", 1.0)
        loss, parts = trainer.lesson_loss(shelf.take(rng, COUPLES))
        for each in optimiser:
            each.zero_grad(set_to_none=True)
        loss.backward()
        done = fellows.agree(model.parameters(), progress.at(step + 1))
        trainer.weights.errors = fellows.mean_known(trainer.weights.errors)
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        for each in optimiser:
            each.step()
        average.update(model)
        step += 1
        for key, value in parts.items():
            running[key] = running.get(key, value) * 0.95 + 0.05 * value
        if curves is not None and (step % args.report == 0 or done >= 1):
            errors = dict(zip(styles, trainer.weights.errors.tolist(), strict=True))
            curves.add({"step": step, "seconds": progress.spent_s} | running | errors)
            write_weights(args.run / "dit.safetensors", average.weights)
            saved = {"model": model.state_dict(), "optimiser": [each.state_dict() for each in optimiser]}
            saved |= {"average": average.weights, "errors": trainer.weights.errors}
            save_checkpoint(checkpoint, saved | {"step": step, "spent": progress.spent_s})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pool", type=Path, default=Path("/tmp/rheo-pool"))
    parser.add_argument("--run", type=Path, default=Path("/tmp/rheo-run"))
    parser.add_argument("--begin-with", type=Path, required=True, help="the model folder whose blocks and head to take")
    parser.add_argument("--steps", type=int, default=20000)
    parser.add_argument("--minutes", type=float, default=0, help="end the schedule after this time if that is earlier")
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--often", type=names_of, default=(), help="styles to draw more often, by commas")
    parser.add_argument("--report", type=int, default=100)
    parser.add_argument("--seed", type=int, default=5)
    parser.add_argument("--processes", type=int, default=1, help="each of this many processes has its own lessons")
    args = parser.parse_args()
    side_by_side(args.processes, train, args)


if __name__ == "__main__":
    main()
