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


def lines(x: Tensor, sigma: float, strength: float) -> Tensor:
    """Contours as bands a few pixels wide, [..., 1, H, W] in [0, 1]: the brightness slope of a softened picture.

    Slopes count relative to those around them, so that a dim scene is drawn as firmly as a bright one. The softening sets
    the width: a line thinner than about three pixels does not survive the autoencoder.
    """
    slope = edges(blur(luma(x), sigma))
    around = blur(slope, 14.0)
    return soft_step(slope * (strength / (around + 0.06)), 0.55, 1.6)


def soft_step(field: Tensor, low: float, high: float) -> Tensor:
    """0 below ``low``, 1 above ``high``, a smooth rise between."""
    t = ((field - low) / (high - low)).clamp(0, 1)
    return t * t * (3 - 2 * t)


def posterise(field: Tensor, levels: int, hardness: float) -> Tensor:
    """[0, 1] → ``levels`` + 1 flat steps with soft edges."""
    scaled = field.clamp(0, 1) * levels
    step = scaled.floor().clamp(max=levels - 1)
    return (step + torch.sigmoid((scaled - step - 0.5) * hardness)) / levels


def colour(x: Tensor, red: float, green: float, blue: float) -> Tensor:
    """One colour as [3, 1, 1], like ``x``."""
    return x.new_tensor([red, green, blue]).view(3, 1, 1)


def pencil(x: Tensor) -> Tensor:
    """Graphite lines and light shading on warm paper."""
    grey = blur(luma(x), 0.8)
    shade = ((grey + 0.08) / (blur(grey, 5.0) + 0.08)).clamp(0, 1) ** 2.5
    tone = (0.78 + 0.27 * blur(grey, 2.0)).clamp(0, 1)
    return shade * (1 - 0.6 * lines(x, 1.2, 0.8)) * tone * colour(x, 0.98, 0.965, 0.93)


def ink(x: Tensor) -> Tensor:
    """Black brush and white paper, nothing between."""
    grey = blur(luma(x), 1.2)
    threshold = 0.6 * blur(grey, 12.0) + 0.18
    return torch.sigmoid((grey - threshold) * 22).expand_as(x) * 0.96 + 0.02


def blueprint(x: Tensor) -> Tensor:
    """White lines on deep blue."""
    base = colour(x, 0.03, 0.16, 0.47) * (0.65 + 0.6 * blur(luma(x), 2.5))
    return base + lines(x, 1.5, 0.95) * (colour(x, 0.92, 0.97, 1.0) - base)


def neon(x: Tensor) -> Tensor:
    """Glowing magenta and cyan contours in the dark."""
    line = lines(x, 1.6, 0.9)
    mix = soft_step(blur(luma(x), 6.0), 0.25, 0.65)
    tint = colour(x, 0.05, 0.95, 1.0) + mix * (colour(x, 1.0, 0.1, 0.85) - colour(x, 0.05, 0.95, 1.0))
    return (colour(x, 0.05, 0.01, 0.11) + tint * (0.95 * line + 0.45 * blur(line, 3.5))).clamp(0, 1)


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
    return (grey * colour(x, 1.08, 0.88, 0.62)).clamp(0, 1)


def night_vision(x: Tensor) -> Tensor:
    """An image intensifier: bright green, blooming."""
    grey = luma(x)
    light = (0.75 * blur(grey, 0.7) + 0.25 * blur(grey, 5.0)).clamp(0, 1) ** 0.75
    return gradient_map(light, ((0.0, 0.05, 0.01), (0.02, 0.42, 0.08), (0.15, 0.85, 0.25), (0.75, 1.0, 0.7)))


def comic(x: Tensor) -> Tensor:
    """Flat strong colours, indigo shadows, cream lights, bold black outlines."""
    flat = smooth_inside(x, 2.5, 0.012)
    grey = luma(flat)
    bright = saturate(flat / (grey + 0.15) * 0.62, 2.0).clamp(0, 1)
    tone = posterise(soft_step(grey, 0.0, 0.9), 3, 9)
    dark, light = soft_step(tone, 0.0, 0.34), soft_step(tone, 0.67, 1.0)
    shadow, cream = colour(x, 0.13, 0.08, 0.36), colour(x, 1.0, 0.95, 0.72)
    inked = shadow + dark * (bright - shadow)
    return (inked + light * (cream - inked)) * (1 - lines(x, 1.7, 1.0))


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


def pixel_art(x: Tensor) -> Tensor:
    """Square pixels of 8×8 in few, strong colours."""
    height, width = x.shape[-2:]
    cells = F.avg_pool2d(x.reshape(-1, 3, height, width), 8, ceil_mode=True, count_include_pad=False)
    cells = saturate((cells - 0.5) * 1.25 + 0.5, 1.7)
    cells = posterise(cells, 4, 8)
    big = cells.repeat_interleave(8, -2).repeat_interleave(8, -1)[..., :height, :width]
    return big.reshape(x.shape)


def pop_art(x: Tensor) -> Tensor:
    """A screen print in four flat inks: blue, red, yellow, cream."""
    grey = posterise(soft_step(blur(luma(x), 1.5), 0.04, 0.86), 3, 9)
    return gradient_map(grey, ((0.07, 0.16, 0.62), (0.9, 0.13, 0.3), (1.0, 0.83, 0.1), (0.99, 0.97, 0.86)))


def aurora(x: Tensor) -> Tensor:
    """Northern lights: violet shadows, green and pale glow."""
    grey = luma(x)
    light = 0.7 * blur(grey, 0.8) + 0.3 * blur(grey, 7.0)
    stops = ((0.06, 0.02, 0.2), (0.34, 0.1, 0.6), (0.08, 0.62, 0.66), (0.45, 0.97, 0.6), (0.93, 1.0, 0.86))
    return gradient_map(light, stops)


def stained_glass(x: Tensor) -> Tensor:
    """Panes of glowing glass, diamonds of 16 pixels, in dark leading."""
    height, width = x.shape[-2:]
    row = torch.arange(height, dtype=x.dtype)[:, None] + 0.5
    column = torch.arange(width, dtype=x.dtype)[None] + 0.5
    along, across = (row + column) / 16, (row - column) / 16
    pane = along.floor().long() * 4096 + across.floor().long() + 2048
    _, index = pane.flatten().unique(return_inverse=True)
    flat = x.reshape(-1, 3, height * width)
    count = torch.bincount(index).to(x.dtype)
    mean = x.new_zeros(flat.shape[0], 3, len(count)).index_add_(2, index, flat) / count
    pane_colour = mean[..., index].reshape(x.shape)
    glass = 0.45 * pane_colour + 0.55 * blur(x, 1.0)
    glass = saturate(((glass - 0.45) * 1.4 + 0.5).clamp(0, 1), 2.3).clamp(0, 1)
    near = torch.minimum((along - along.round()).abs(), (across - across.round()).abs()) * 16
    return glass * (0.12 + 0.88 * soft_step(near, 0.3, 1.9))


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
    "pixel art": pixel_art,
    "pop art": pop_art,
    "aurora": aurora,
    "stained glass": stained_glass,
}
"""Every style by name, in a fixed order; the first leaves the picture as it is."""


def stylise(style: str, frames: Tensor) -> Tensor:
    """The true picture of a style: float frames [..., 3, H, W] in [0, 1] → the same shape. KeyError for an unknown name."""
    return FILTERS[style](frames).clamp(0, 1)
