"""What a viewer sees when the prompt changes in mid-stream: at once, or blended over some chunks.

Each frame is placed between the two styles' true pictures A and B: its share of the new one is the α that brings A + α(B − A)
nearest to it. What is left over then is the frame's error; a broken frame would stand out by it.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.clips import MODERATE, with_motion
from bench.rig import Rig, chunk_of, decibels
from shared.engine.plan.spec import FRAMES_PER_LATENT
from training.filters import stylise

AROUND = 8  # chunks beside a blend, so that both styles are seen by themselves
BROKEN_DB = 3.0
"""A frame is broken when it lies this far below the worse of the two styles' usual PSNR."""


@dataclass(frozen=True)
class PromptChange:
    """From one style to another before chunk ``chunk``, with the old one fading over ``blend_chunks``.

    ``shares``: α of every chunk from there on. ``chunks_until``: chunks until the new style has more than half of the
    picture for good (1: at once; 0: never). ``broken``: frames that stand out. ``usual_db`` and ``worst_db``: a frame's PSNR to
    the mix of the two that is nearest to it. ``largest_jump`` of α between chunks.
    """

    before: str
    after: str
    blend_chunks: int
    chunk: int
    shares: list[float]
    chunks_until: int
    broken: int
    usual_db: float
    worst_db: float
    largest_jump: float


def shares_of(made: Tensor, old: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    """(α [n], mean squared error that is left [n]) of frames [n, H, W, 3] between old and new, colours in [0, 1]."""
    away, towards = (made - old).flatten(1), (new - old).flatten(1)
    share = (away * towards).sum(1) / towards.square().sum(1).clamp(min=1e-9)
    left = (away - share.clamp(0, 1)[:, None] * towards).square().mean(1)
    return share, left


def change_prompt(
    rig: Rig, clip: Tensor, styles: tuple[str, str], prompts: tuple[str, str], blend_chunks: int
) -> PromptChange:
    """Runs the clip with the change in its middle; to and fro if it is too short for that."""
    clip = with_motion(clip, MODERATE, max(len(clip), FRAMES_PER_LATENT * (blend_chunks + AROUND) + 1))
    last = chunk_of(len(clip) - 1)
    at = max(1, (last + 1 - blend_chunks) // 2)
    made = rig.restyle(clip, prompts[0], {at: prompts[1]}, blend_chunks).float() / 255
    pixels = clip.permute(0, 3, 1, 2).float() / 255
    old, new = (stylise(style, pixels).permute(0, 2, 3, 1) for style in styles)
    share, left = shares_of(made, old, new)
    chunk = torch.tensor([chunk_of(i) for i in range(len(clip))])
    db = [decibels(float(error)) for error in left]
    ends = at + blend_chunks + 2
    usual = min(
        statistics.median([d for d, c in zip(db, chunk.tolist(), strict=True) if c < at]),
        statistics.median([d for d, c in zip(db, chunk.tolist(), strict=True) if c >= min(ends, last)]),
    )
    rows = [float(share[chunk == c].mean()) for c in range(at, last + 1)]
    behind = max((i for i, row in enumerate(rows) if row <= 0.5), default=-1)
    whole_row = [float(share[chunk == at - 1].mean()), *rows]
    return PromptChange(
        before=styles[0],
        after=styles[1],
        blend_chunks=blend_chunks,
        chunk=at,
        shares=[round(row, 3) for row in rows],
        chunks_until=0 if behind == len(rows) - 1 else behind + 2,
        broken=sum(d < usual - BROKEN_DB for d in db),
        usual_db=usual,
        worst_db=min(db),
        largest_jump=max(abs(b - a) for a, b in zip(whole_row, whole_row[1:], strict=False)),
    )
