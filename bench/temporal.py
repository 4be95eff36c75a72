"""Temporal error: how much a restyled video changes where the source only moved.

The optical flow of the *source* carries each restyled frame onto the next one; what differs then was not motion. Only pixels
count whose flow is the same forth and back, and which the source itself follows.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from torch import Tensor

from shared.media.flow import carried, grid_of

AGREEMENT = 1.0
"""Pixels that the flow forth and back may differ by."""
LIKENESS = 0.1
"""How much of the source's own colour may change along the flow, of 1."""


@dataclass(frozen=True)
class Carry:
    """From one frame to the next: where each pixel came from (x, y), float32 [H, W, 2], and where that is trusted."""

    source: np.ndarray
    trusted: np.ndarray


def carries(clip: Tensor) -> list[Carry]:
    """The motion of a source clip, uint8 [n, H, W, 3] → n − 1 steps."""
    frames = clip.numpy()
    grey = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames]
    finder = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    grid = grid_of(*clip.shape[1:3])
    still = np.zeros_like(grid)
    steps: list[Carry] = []
    for i in range(1, len(frames)):
        back = finder.calc(grey[i], grey[i - 1], np.zeros_like(still))
        forth = finder.calc(grey[i - 1], grey[i], np.zeros_like(still))
        source = grid + back
        there = carried(forth, source)
        inside = (source >= 0).all(-1) & (source[..., 0] < clip.shape[2] - 1) & (source[..., 1] < clip.shape[1] - 1)
        agrees = np.linalg.norm(there + back, axis=-1) < AGREEMENT
        change = np.abs(carried(frames[i - 1].astype(np.float32), source) - frames[i]).mean(-1) / 255
        steps.append(Carry(source, inside & agrees & (change < LIKENESS)))
    return steps


def warp_error(video: Tensor, steps: list[Carry]) -> float:
    """Root mean square of what changes along the source's motion; video uint8 [n, H, W, 3], colours in [0, 1]."""
    frames = video.numpy().astype(np.float32) / 255
    total, count = 0.0, 0
    for i, step in enumerate(steps, 1):
        change = (frames[i] - carried(frames[i - 1], step.source))[step.trusted]
        total += float(np.square(change).sum())
        count += change.size
    return (total / count) ** 0.5 if count else float("nan")


def flicker(video: Tensor) -> float:
    """Root mean square change from frame to frame, for a source that stands still; colours in [0, 1]."""
    steps = (video[1:].float() - video[:-1].float()) / 255
    return float(steps.square().mean().sqrt())
