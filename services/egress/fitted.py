"""A picture of one size in a place of another: outputs that were opened with a size keep it when the stream changes its own."""

from __future__ import annotations

import av
import numpy as np


def fitted(pixels: np.ndarray, width: int, height: int) -> np.ndarray:
    """uint8 [h, w, 3] → [height, width, 3]: scaled until it fits, its aspect kept, black bars beside it."""
    down, across = pixels.shape[:2]
    if (across, down) == (width, height):
        return pixels
    scale = min(width / across, height / down)
    inner = min(width, max(1, round(across * scale))), min(height, max(1, round(down * scale)))
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
    picture = frame.reformat(width=inner[0], height=inner[1]).to_ndarray()
    canvas = np.zeros((height, width, 3), np.uint8)
    left, top = (width - inner[0]) // 2, (height - inner[1]) // 2
    canvas[top : top + inner[1], left : left + inner[0]] = picture
    return canvas
