"""The true filters: each named style as image processing. Training targets, and what quality is measured against.

Every filter maps float32 frames [..., 3, H, W] in [0, 1] to the same shape. A filter looks at one frame and at a small
neighbourhood only, has no thresholds without a soft edge, and draws no random numbers: a moving picture gives a moving
filtered picture without flicker. Sizes are in pixels of the frame as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from training.textures import blur

NO_STYLE = "none"


def luma(x: Tensor) -> Tensor:
    """[..., 3, H, W] → [..., 1, H, W]."""
    return 0.299 * x[..., 0:1, :, :] + 0.587 * x[..., 1:2, :, :] + 0.114 * x[..., 2:3, :, :]


def edges(field: Tensor) -> Tensor:
    """Length of the brightness slope of [..., 1, H, W], about 1 at a full black-white edge."""
    flat = F.pad(field.reshape(-1, 1, *field.shape[-2:]), (1, 1, 1, 1), mode="replicate")
    gx = flat[..., 1:-1, 2:] - flat[..., 1:-1, :-2]
    gy = flat[..., 2:, 1:-1] - flat[..., :-2, 1:-1]
    return torch.sqrt(gx * gx + gy * gy + 1e-6).reshape(field.shape)


def gradient_map(field: Tensor, stops: Sequence[tuple[float, float, float]]) -> Tensor:
    """Maps [..., 1, H, W] in [0, 1] through evenly spaced colours to [..., 3, H, W], linear between them."""
    table = torch.tensor(stops, dtype=field.dtype)
    place = field.squeeze(-3).clamp(0, 1) * (len(stops) - 1)
    low = place.floor().clamp(max=len(stops) - 2)
    index, part = low.long(), (place - low)[..., None]
    return (table[index] * (1 - part) + table[index + 1] * part).movedim(-1, -3)


def smooth_inside(x: Tensor, sigma: float, keep: float) -> Tensor:
    """Edge-keeping smoothing (a self-guided filter): flat areas go flat, edges whose variance exceeds ``keep`` stay."""
    mean = blur(x, sigma)
    variance = (blur(x * x, sigma) - mean * mean).clamp(min=0)
    share = blur(variance / (variance + keep), sigma)
    return mean + share * (x - mean)


def saturate(x: Tensor, amount: float) -> Tensor:
    """Colour strength times ``amount``; may leave [0, 1]."""
    grey = luma(x)
    return grey + (x - grey) * amount


def none(x: Tensor) -> Tensor:
    """No style: the picture itself."""
    return x


def pencil(x: Tensor) -> Tensor:
    """Graphite lines and light shading on warm paper."""
    grey = luma(x)
    line = ((grey + 0.08) / (blur(grey, 4.0) + 0.08)).clamp(0, 1) ** 3
    tone = (0.72 + 0.33 * blur(grey, 1.5)).clamp(0, 1)
    return line * tone * x.new_tensor([0.98, 0.965, 0.93]).view(3, 1, 1)


def ink(x: Tensor) -> Tensor:
    """Black brush and white paper, nothing between."""
    grey = blur(luma(x), 0.8)
    threshold = 0.55 * blur(grey, 12.0) + 0.2
    return torch.sigmoid((grey - threshold) * 18).expand_as(x) * 0.98


def blueprint(x: Tensor) -> Tensor:
    """White lines on deep blue."""
    grey = blur(luma(x), 0.7)
    base = x.new_tensor([0.03, 0.16, 0.47]).view(3, 1, 1) * (0.7 + 0.5 * blur(grey, 2.0))
    line = (edges(grey) * 2.6 - 0.08).clamp(0, 1)
    return base + line * (x.new_tensor([0.92, 0.97, 1.0]).view(3, 1, 1) - base)


def neon(x: Tensor) -> Tensor:
    """Glowing magenta and cyan contours in the dark."""
    grey = blur(luma(x), 0.8)
    line = (edges(grey) * 2.6 - 0.08).clamp(0, 1)
    glow = blur(line, 3.0)
    mix = ((blur(grey, 5.0) - 0.3) / 0.4).clamp(0, 1)
    cyan, magenta = x.new_tensor([0.1, 0.95, 1.0]).view(3, 1, 1), x.new_tensor([1.0, 0.1, 0.85]).view(3, 1, 1)
    colour = cyan + mix * (magenta - cyan)
    return (x.new_tensor([0.04, 0.01, 0.09]).view(3, 1, 1) + colour * (0.9 * line + 0.7 * glow)).clamp(0, 1)


def thermal(x: Tensor) -> Tensor:
    """A heat camera: dark is cold and blue, bright is hot and yellow."""
    stops = (
        (0.0, 0.0, 0.12),
        (0.22, 0.0, 0.55),
        (0.72, 0.05, 0.5),
        (0.98, 0.35, 0.08),
        (1.0, 0.8, 0.1),
        (1.0, 1.0, 0.8),
    )
    return gradient_map(blur(luma(x), 1.2), stops)


def sepia(x: Tensor) -> Tensor:
    """An old brown photograph, faded."""
    grey = luma(x) * 0.82 + 0.1
    return (grey * x.new_tensor([1.08, 0.88, 0.62]).view(3, 1, 1)).clamp(0, 1)


def night_vision(x: Tensor) -> Tensor:
    """An image intensifier: bright green, blooming."""
    grey = luma(x)
    light = (0.75 * blur(grey, 0.7) + 0.25 * blur(grey, 5.0)).clamp(0, 1) ** 0.75
    return gradient_map(light, ((0.0, 0.05, 0.01), (0.02, 0.42, 0.08), (0.15, 0.85, 0.25), (0.75, 1.0, 0.7)))


def comic(x: Tensor) -> Tensor:
    """Flat strong colours with dark outlines."""
    flat = saturate(smooth_inside(x, 2.0, 0.01), 1.9).clamp(0, 1)
    levels = flat * 3
    step = levels.floor()
    flat = ((step + torch.sigmoid((levels - step - 0.5) * 10)) / 3).clamp(0, 1)
    line = (edges(blur(luma(x), 1.0)) * 3.0 - 0.25).clamp(0, 1)
    return flat * (1 - line)


def watercolour(x: Tensor) -> Tensor:
    """Pale washes on white paper, a little darker along their rims."""
    wash = saturate(smooth_inside(x, 3.0, 0.02), 1.5).clamp(0, 1)
    rim = (edges(blur(luma(wash), 1.5)) * 1.2).clamp(0, 0.35)
    return (1 - (1 - wash) * 0.55 - rim * 0.5).clamp(0, 1)


def vaporwave(x: Tensor) -> Tensor:
    """Teal shadows, pink lights."""
    return gradient_map(luma(x), ((0.0, 0.12, 0.3), (0.0, 0.55, 0.62), (0.95, 0.45, 0.75), (1.0, 0.9, 0.95)))


def x_ray(x: Tensor) -> Tensor:
    """A cold negative without colour."""
    grey = (1 - luma(x)).clamp(0, 1) ** 1.3
    return gradient_map(grey, ((0.0, 0.02, 0.06), (0.3, 0.46, 0.56), (0.88, 0.98, 1.0)))


FILTERS: dict[str, Callable[[Tensor], Tensor]] = {
    NO_STYLE: none,
    "pencil": pencil,
    "ink": ink,
    "blueprint": blueprint,
    "neon": neon,
    "thermal": thermal,
    "sepia": sepia,
    "night vision": night_vision,
    "comic": comic,
    "watercolour": watercolour,
    "vaporwave": vaporwave,
    "x-ray": x_ray,
}
"""Every style by name, in a fixed order; the first leaves the picture as it is."""


def stylise(style: str, frames: Tensor) -> Tensor:
    """The true picture of a style: float frames [..., 3, H, W] in [0, 1] → the same shape. KeyError for an unknown name."""
    return FILTERS[style](frames).clamp(0, 1)
