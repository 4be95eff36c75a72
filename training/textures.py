"""Still textures and shapes, drawn from a random generator: what procedural video is made of.

Everything is float32 in [0, 1] and shaped [channels, height, width]. A *canvas* has four channels: red, green, blue
and coverage.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

GLYPHS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789!?&%#*+-/=<>"


def fractal(
    rng: np.random.Generator, height: int, width: int, slope: float, stretch: float = 1.0, angle: float = 0.0
) -> np.ndarray:
    """A random field with power falling as frequency^-2·slope, in [0, 1]. ``stretch`` > 1 makes it grainy along ``angle``."""
    fy = np.fft.fftfreq(height)[:, None] * max(height, width)
    fx = np.fft.rfftfreq(width)[None, :] * max(height, width)
    along = fx * math.cos(angle) + fy * math.sin(angle)
    across = -fx * math.sin(angle) + fy * math.cos(angle)
    radius = np.sqrt((along * stretch) ** 2 + across**2) + 0.7
    spectrum = rng.standard_normal(radius.shape) + 1j * rng.standard_normal(radius.shape)
    field = np.fft.irfft2(spectrum * radius**-slope, s=(height, width))
    field = (field - field.mean()) / (field.std() + 1e-9)
    return np.clip(field * 0.22 + 0.5, 0.0, 1.0).astype(np.float32)


def palette(rng: np.random.Generator, colours: int) -> np.ndarray:
    """``colours`` RGB rows, from a mix of moods: vivid, natural (muted), dark, pale and grey."""
    mood = rng.choice(5, p=[0.25, 0.4, 0.1, 0.15, 0.1])
    hue = rng.random() + rng.normal(0, 0.12 if mood == 1 else 0.3, colours)
    saturation = rng.uniform([0.6, 0.1, 0.1, 0.05, 0.0][mood], [1.0, 0.6, 0.8, 0.4, 0.08][mood], colours)
    value = rng.uniform([0.3, 0.1, 0.0, 0.65, 0.0][mood], [1.0, 0.95, 0.4, 1.0, 1.0][mood], colours)
    wheel = np.abs(((hue[:, None] + np.array([0, 2 / 3, 1 / 3])) % 1.0) * 6 - 3) - 1
    return (value[:, None] * (1 - saturation[:, None] * (1 - np.clip(wheel, 0, 1)))).astype(np.float32)


def colourise(rng: np.random.Generator, field: np.ndarray) -> np.ndarray:
    """Maps a field [h, w] through a random palette to [3, h, w]."""
    stops = palette(rng, int(rng.integers(2, 6)))
    if rng.random() < 0.5:
        stops = stops[np.argsort(stops.sum(1))]
    places = np.linspace(0.15, 0.85, len(stops))
    return np.stack([np.interp(field, places, stops[:, c]) for c in range(3)]).astype(np.float32)


def pattern(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """One field [h, w] in [0, 1]: stripes, checks, rings, cells, waves, gradient or plain, slightly warped."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    if rng.random() < 0.5:
        amount = rng.uniform(2, 14)
        x = x + amount * (fractal(rng, height, width, 1.8) - 0.5) * 4
        y = y + amount * (fractal(rng, height, width, 1.8) - 0.5) * 4
    angle, period = rng.uniform(0, math.pi), float(np.exp(rng.uniform(math.log(5), math.log(60))))
    u, v = x * math.cos(angle) + y * math.sin(angle), -x * math.sin(angle) + y * math.cos(angle)
    kind = rng.integers(7)
    if kind == 0:
        field = np.sin(u * 2 * math.pi / period) * 0.5 + 0.5
    elif kind == 1:
        field = ((np.floor(u / period) + np.floor(v / period)) % 2).astype(np.float32)
    elif kind == 2:
        cx, cy = rng.uniform(0, width), rng.uniform(0, height)
        field = np.sin(np.hypot(x - cx, y - cy) * 2 * math.pi / period) * 0.5 + 0.5
    elif kind == 3:
        seeds = rng.random((int(rng.integers(6, 40)), 2)) * [height, width]
        distance = ((y[None] - seeds[:, 0, None, None]) ** 2 + (x[None] - seeds[:, 1, None, None]) ** 2).argmin(0)
        field = rng.random(len(seeds))[distance]
    elif kind == 4:
        field = np.sin(u * 2 * math.pi / period) * np.sin(v * 2 * math.pi / period) * 0.5 + 0.5
    elif kind == 5:
        field = (u - u.min()) / (u.max() - u.min() + 1e-6)
    else:
        field = np.full((height, width), rng.random())
    if rng.random() < 0.3:
        field = (field > rng.uniform(0.3, 0.7)).astype(np.float32)
    return field.astype(np.float32)


def texture(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A coloured texture [3, h, w]."""
    kind = rng.random()
    if kind < 0.5:
        stretch = 1.0 if rng.random() < 0.5 else rng.uniform(2, 8)
        field = fractal(rng, height, width, rng.uniform(0.7, 2.2), stretch, rng.uniform(0, math.pi))
    elif kind < 0.85:
        field = pattern(rng, height, width)
    else:
        field = np.clip(
            pattern(rng, height, width) * 0.6 + fractal(rng, height, width, rng.uniform(0.8, 1.6)) * 0.4, 0, 1
        )
    image = colourise(rng, field)
    if rng.random() < 0.5:
        grain = fractal(rng, height, width, rng.uniform(0.5, 1.4)) - 0.5
        image = image + rng.uniform(0.05, 0.5) * grain
    return np.clip(image, 0, 1).astype(np.float32)


def outline(rng: np.random.Generator, radius: float) -> list[tuple[float, float]]:
    """A closed polygon around (0, 0): ellipse, regular polygon, star, or a smooth blob."""
    kind = rng.integers(4)
    angle = rng.uniform(0, 2 * math.pi)
    squash = rng.uniform(0.35, 1.0)
    if kind == 0:
        turns, radii = np.linspace(0, 2 * math.pi, 40, endpoint=False), np.full(40, radius)
    elif kind == 1:
        n = int(rng.integers(3, 8))
        turns, radii = np.linspace(0, 2 * math.pi, n, endpoint=False), np.full(n, radius)
    elif kind == 2:
        n = int(rng.integers(4, 9)) * 2
        turns = np.linspace(0, 2 * math.pi, n, endpoint=False)
        radii = radius * np.where(np.arange(n) % 2, rng.uniform(0.35, 0.7), 1.0)
    else:
        turns = np.linspace(0, 2 * math.pi, 48, endpoint=False)
        bumps = sum(rng.normal(0, 0.25 / k) * np.cos(k * turns + rng.uniform(0, 6.3)) for k in range(1, 6))
        radii = radius * np.clip(1 + bumps, 0.3, 1.8)
    x, y = radii * np.cos(turns), radii * np.sin(turns) * squash
    cos, sin = math.cos(angle), math.sin(angle)
    return [(float(a * cos - b * sin), float(a * sin + b * cos)) for a, b in zip(x, y, strict=True)]


def polygon_mask(height: int, width: int, points: list[tuple[float, float]]) -> np.ndarray:
    """Coverage [h, w] of a polygon in pixel coordinates, antialiased 2×."""
    image = Image.new("L", (width * 2, height * 2), 0)
    ImageDraw.Draw(image).polygon([(x * 2, y * 2) for x, y in points], fill=255)
    return np.asarray(image.resize((width, height), Image.Resampling.BOX), dtype=np.float32) / 255


def shade(rng: np.random.Generator, image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Gives a flat shape some volume: brighter towards a light, darker at its rim."""
    soft = blur(torch.from_numpy(mask)[None], max(2.0, math.sqrt(float(mask.sum())) / 7))[0].numpy()
    gy, gx = np.gradient(soft)
    angle = rng.uniform(0, 2 * math.pi)
    slope = gx * math.cos(angle) + gy * math.sin(angle)
    light = slope / (np.abs(slope).max() + 1e-6) * rng.uniform(0, 0.6) + (soft - 0.7) * rng.uniform(0, 0.6)
    return np.clip(image * (1 + light[None]), 0, 1).astype(np.float32)


def dead_leaves(rng: np.random.Generator, height: int, width: int, leaves: int, largest: float) -> np.ndarray:
    """Overlapping textured shapes of many sizes [3, h, w]; its statistics are close to those of natural pictures."""
    image = texture(rng, height, width)
    bank = [texture(rng, height, width) for _ in range(5)]
    for _ in range(leaves):
        radius = float(largest * rng.power(0.6)) + 2.5
        span = int(radius * 2.2) + 2
        x0, y0 = int(rng.integers(-span // 2, width)), int(rng.integers(-span // 2, height))
        left, top = max(0, x0), max(0, y0)
        right, bottom = min(width, x0 + span), min(height, y0 + span)
        if right - left < 2 or bottom - top < 2:
            continue
        points = [(x + span / 2 + x0 - left, y + span / 2 + y0 - top) for x, y in outline(rng, radius)]
        mask = polygon_mask(bottom - top, right - left, points)
        patch = bank[rng.integers(5)][:, top:bottom, left:right]
        gain, tint = rng.uniform(0.5, 1.3), rng.normal(0, 0.15, (3, 1, 1))
        patch = np.clip(patch * gain + tint, 0, 1).astype(np.float32)
        if radius > 8 and rng.random() < 0.6:
            patch = shade(rng, patch, mask)
        image[:, top:bottom, left:right] += mask * (patch - image[:, top:bottom, left:right])
    return image


def strokes(rng: np.random.Generator, height: int, width: int, count: int, length: float, spread: float) -> np.ndarray:
    """A canvas [4, h, w] of many thin curved strokes about one direction: grass, hair, twigs, rain."""
    image = Image.new("RGBA", (width, height), (0, 0, 0, 0))
    draw = ImageDraw.Draw(image)
    colours = (palette(rng, 6) * 255).astype(int)
    lean = rng.normal(0, 0.6)
    for _ in range(count):
        x, y = rng.uniform(-10, width + 10), rng.uniform(0, height + length)
        angle = -math.pi / 2 + lean + rng.normal(0, spread)
        bend, step = rng.normal(0, 0.15), length * rng.uniform(0.4, 1.2) / 4
        points = [(x, y)]
        for _ in range(4):
            x, y, angle = x + step * math.cos(angle), y + step * math.sin(angle), angle + bend
            points.append((x, y))
        colour = np.clip(colours[rng.integers(6)] * rng.uniform(0.6, 1.3), 0, 255).astype(int)
        draw.line(points, fill=(int(colour[0]), int(colour[1]), int(colour[2]), 255), width=int(rng.integers(1, 4)))
    return np.asarray(image, dtype=np.float32).transpose(2, 0, 1) / 255


def lettering(rng: np.random.Generator, height: int, width: int, lines: int) -> np.ndarray:
    """A canvas [4, h, w] with lines of random characters of several sizes."""
    image = Image.new("RGBA", (width, height), (0, 0, 0, 0))
    draw = ImageDraw.Draw(image)
    for _ in range(lines):
        size = int(rng.integers(9, 56))
        text = "".join(rng.choice(list(GLYPHS + "   "), int(rng.integers(3, 18))))
        colour = (palette(rng, 1)[0] * 255).astype(int)
        place = (float(rng.uniform(-10, width * 0.7)), float(rng.uniform(0, height - size)))
        draw.text(place, text, font=ImageFont.load_default(size), fill=(*(int(c) for c in colour), 255))
    return np.asarray(image, dtype=np.float32).transpose(2, 0, 1) / 255


def blur(field: torch.Tensor, sigma: float) -> torch.Tensor:
    """Gaussian blur of [..., h, w] with edge replication; each leading entry alone. Wide ones work at a quarter of the size."""
    if sigma >= 4 and field.shape[-1] % 4 == 0 and field.shape[-2] % 4 == 0:
        small = F.avg_pool2d(field.reshape(-1, 1, *field.shape[-2:]), 4)
        wide = blur(small, sigma / 4)
        return F.interpolate(wide, scale_factor=4, mode="bilinear", align_corners=False).reshape(field.shape)
    radius = max(1, min(int(sigma * 3 + 0.5), min(field.shape[-2:]) - 1))
    x = torch.arange(-radius, radius + 1, dtype=field.dtype)
    kernel = torch.exp(-0.5 * (x / sigma) ** 2)
    kernel = kernel / kernel.sum()
    flat = field.reshape(-1, 1, *field.shape[-2:])
    flat = F.conv2d(F.pad(flat, (radius, radius, 0, 0), mode="replicate"), kernel.view(1, 1, 1, -1))
    flat = F.conv2d(F.pad(flat, (0, 0, radius, radius), mode="replicate"), kernel.view(1, 1, -1, 1))
    return flat.reshape(field.shape)
