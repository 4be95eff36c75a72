"""Clips for measuring: read from files, and made still, slow or fast; cut into a stream's chunks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import torch
from torch import Tensor

from shared.engine.plan.spec import FRAMES_PER_LATENT

FIRST = FRAMES_PER_LATENT + 1
"""Frames of a stream's first chunk."""
STILL, MODERATE, FAST = "static", "moderate", "fast"
MOTIONS = (STILL, MODERATE, FAST)
STRIDES = {STILL: 0, MODERATE: 1, FAST: 4}
"""Frames of the clip per frame shown."""


def read_clip(path: Path, width: int, height: int, seconds: float) -> Tensor:
    """The clip's frames, scaled to cover this size and cut evenly: uint8 [n, H, W, 3], n = 4k + 1 as chunks need it.

    ``seconds`` 0 reads all of it. Raises ValueError for a clip that is too short for a stream's first chunk.
    """
    frames: list[np.ndarray] = []
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        rate = float(stream.average_rate or 25)
        for frame in container.decode(stream):
            if seconds and len(frames) >= seconds * rate:
                break
            scale = max(width / frame.width, height / frame.height)
            wide, high = max(width, round(frame.width * scale)), max(height, round(frame.height * scale))
            picture = frame.reformat(wide, high, "rgb24", interpolation="AREA").to_ndarray()
            left, top = (wide - width) // 2, (high - height) // 2
            frames.append(picture[top : top + height, left : left + width])
    if len(frames) < FIRST:
        raise ValueError(f"{path}: {len(frames)} frames are too few, a stream starts with {FIRST}")
    return torch.from_numpy(np.stack(frames[: whole(len(frames))]))


def whole(frames: int) -> int:
    """The largest 4k + 1 that is not more than ``frames``."""
    return (frames - 1) // FRAMES_PER_LATENT * FRAMES_PER_LATENT + 1


def places(clip_frames: int, motion: str, start: int, count: int) -> list[int]:
    """Which of the clip's frames an endless source shows from its frame ``start`` on: to and fro, without a cut."""
    period = max(1, 2 * (clip_frames - 1))
    steps = ((start + i) * STRIDES[motion] % period for i in range(count))
    return [step if step < clip_frames else period - step for step in steps]


def with_motion(clip: Tensor, motion: str, frames: int = 0) -> Tensor:
    """The clip as a still picture, as it is, or four times as fast; to and fro until there are 4k + 1 ≤ ``frames``."""
    return clip[places(len(clip), motion, 0, whole(frames or len(clip)))]


def motion_of(before: Tensor | None, frames: Tensor) -> list[float]:
    """Each frame's RMSE to the one before (pixels in [−1, 1]), as ingest measures it; 0 for a stream's first frame."""
    whole_row = frames if before is None else torch.cat([before[None], frames])
    steps = (whole_row[1:].float() - whole_row[:-1].float()).div(127.5).square().mean((1, 2, 3)).sqrt().tolist()
    return [0.0, *steps] if before is None else steps


def chunks_of(clip: Tensor) -> Iterator[tuple[Tensor, list[float]]]:
    """A stream's chunks, each with its frames' :func:`motion_of`."""
    at = 0
    while at < len(clip):
        count = FRAMES_PER_LATENT if at else FIRST
        frames = clip[at : at + count]
        yield frames, motion_of(clip[at - 1] if at else None, frames)
        at += count
