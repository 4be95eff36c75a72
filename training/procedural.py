"""Procedural video: moving textures, shapes, landscapes, faces, text, light, noise, camera shake and cuts.

A clip is a pure function of its seed: ``make_clip(seed, frames, height, width)`` gives uint8 [frames, 3, height, width].
Nothing is read from outside. A scene is a list of :class:`Layer`, drawn back to front; each layer is a still canvas
that moves on its own path under a common camera.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F

from training import textures as tx

MARGIN = 48  # canvas pixels beyond each edge of the picture, so that moving layers bring new content in


@dataclass
class Layer:
    """A canvas [4, H+2·MARGIN, W+2·MARGIN] with its path. ``depth`` scales how much the camera moves it (1: fully)."""

    canvas: np.ndarray
    depth: float = 1.0
    velocity: tuple[float, float] = (0.0, 0.0)
    swing: tuple[float, float, float] = (0.0, 0.0, 1.0)  # amplitude x, amplitude y (pixels), angular speed per frame
    turn: float = 0.0  # radians per frame
    zoom: float = 0.0  # relative growth per frame
    ripple: float = 0.0  # pixels of moving wave distortion
    phase: float = field(default=0.0)


@dataclass(frozen=True)
class Camera:
    """Per frame: shift in pixels [n, 2], roll [n] in radians, and zoom [n] (1: none)."""

    shift: np.ndarray
    roll: np.ndarray
    zoom: np.ndarray


def opaque(image: np.ndarray) -> np.ndarray:
    """A canvas that covers everything."""
    return np.concatenate([image, np.ones_like(image[:1])])


def _speed(rng: np.random.Generator, scale: float) -> float:
    return float(rng.normal(0, scale)) if rng.random() < 0.7 else 0.0


def _moving(rng: np.random.Generator, canvas: np.ndarray, lively: float, depth: float = 1.0) -> Layer:
    return Layer(
        canvas,
        depth=depth,
        velocity=(_speed(rng, 2.0 * lively), _speed(rng, 1.2 * lively)),
        swing=(abs(_speed(rng, 5 * lively)), abs(_speed(rng, 5 * lively)), float(rng.uniform(0.1, 0.6))),
        turn=_speed(rng, 0.02 * lively),
        zoom=_speed(rng, 0.006 * lively),
        phase=float(rng.uniform(0, 6.28)),
    )


def _shape_canvas(rng: np.random.Generator, h: int, w: int, radius: float, x: float, y: float) -> np.ndarray:
    mask = tx.polygon_mask(h, w, [(px + x, py + y) for px, py in tx.outline(rng, radius)])
    return np.concatenate([tx.shade(rng, tx.texture(rng, h, w), mask), mask[None]])


def leaves_scene(rng: np.random.Generator, h: int, w: int) -> list[Layer]:
    """Dead leaves behind, a few larger moving shapes before it."""
    back = tx.dead_leaves(rng, h, w, int(rng.integers(20, 220)), float(rng.uniform(12, 110)))
    layers = [_moving(rng, opaque(back), 0.5)]
    for _ in range(int(rng.integers(0, 5))):
        canvas = _shape_canvas(
            rng, h, w, rng.uniform(10, 70), rng.uniform(MARGIN, w - MARGIN), rng.uniform(MARGIN, h - MARGIN)
        )
        layers.append(_moving(rng, canvas, 1.2))
    return layers


def landscape_scene(rng: np.random.Generator, h: int, w: int) -> list[Layer]:
    """A sky with clouds or a sun, ridges at several depths, ground, and grass or trees in front."""
    sky = np.linspace(0, 1, h, dtype=np.float32)[:, None] * np.ones((1, w), np.float32)
    image = tx.colourise(rng, sky * 0.7 + 0.15)
    clouds = np.clip(tx.fractal(rng, h, w, rng.uniform(1.4, 2.0), 1.0) * 2 - rng.uniform(0.6, 1.2), 0, 1)
    image = image + clouds[None] * (rng.uniform(0.6, 1.0) - image) * rng.uniform(0.2, 0.9)
    layers = [Layer(opaque(image.astype(np.float32)), depth=0.3, velocity=(_speed(rng, 0.6), 0.0))]
    horizon = rng.uniform(0.3, 0.6)
    x = np.arange(w, dtype=np.float32)
    for i in range(int(rng.integers(1, 5))):
        ridge = np.full(w, (horizon + 0.1 * i) * h) + sum(
            rng.normal(0, 18 / k) * np.sin(x * k * rng.uniform(0.5, 1.5) * 2 * math.pi / w + rng.uniform(0, 6.3))
            for k in range(1, 12)
        )
        mask = np.clip(np.arange(h, dtype=np.float32)[:, None] - ridge[None], 0, 1)
        layers.append(
            Layer(np.concatenate([tx.texture(rng, h, w), mask[None]]).astype(np.float32), depth=0.4 + 0.15 * i)
        )
    if rng.random() < 0.8:
        canvas = tx.strokes(
            rng, h, w, int(rng.integers(150, 2500)), float(rng.uniform(12, 70)), float(rng.uniform(0.1, 0.6))
        )
        if rng.random() < 0.6:
            canvas[:, : int(h * rng.uniform(0.2, 0.6))] = 0
        layer = _moving(rng, canvas, 0.15)
        layer.ripple = float(rng.uniform(0, 3))
        layers.append(layer)
    if rng.random() < 0.5:
        canvas = _shape_canvas(rng, h, w, rng.uniform(15, 60), rng.uniform(0.3, 0.7) * w, rng.uniform(0.4, 0.7) * h)
        layers.append(_moving(rng, canvas, 1.0))
    return layers


def face_scene(rng: np.random.Generator, h: int, w: int) -> list[Layer]:
    """A head: skin, hair, ears, eyes, nose and mouth, that sways before a soft background. Animals too: any colours."""
    back = tx.dead_leaves(rng, h, w, int(rng.integers(5, 60)), 90.0)
    if rng.random() < 0.7:
        back = tx.blur(torch.from_numpy(back), float(rng.uniform(1, 7))).numpy()
    layers = [_moving(rng, opaque(back), 0.25)]
    for _ in range(int(rng.integers(1, 3))):
        layers.append(_moving(rng, _face_canvas(rng, h, w), 0.7))
        layers[-1].ripple = float(rng.uniform(0, 1.5))
    if rng.random() < 0.4:
        layers.append(_moving(rng, tx.strokes(rng, h, w, int(rng.integers(50, 800)), 50, 0.3), 0.2))
        layers[-1].ripple = float(rng.uniform(0, 3))
    return layers


def _face_canvas(rng: np.random.Generator, h: int, w: int) -> np.ndarray:
    radius = rng.uniform(25, 75)
    cx, cy = rng.uniform(0.3, 0.7) * w, rng.uniform(0.35, 0.65) * h
    canvas = np.zeros((4, h, w), np.float32)
    skin, hair, dark = tx.texture(rng, h, w), tx.texture(rng, h, w), tx.palette(rng, 1)[0] * 0.4
    mean = skin.mean((1, 2), keepdims=True)
    skin = mean + (skin - mean) * rng.uniform(0.1, 0.6)

    def ellipse(x: float, y: float, rx: float, ry: float, paint: np.ndarray, volume: bool = False) -> None:
        turns = np.linspace(0, 2 * math.pi, 36, endpoint=False)
        mask = tx.polygon_mask(
            h,
            w,
            [(cx + x * radius + rx * radius * math.cos(a), cy + y * radius + ry * radius * math.sin(a)) for a in turns],
        )
        image = paint if paint.ndim == 3 else np.broadcast_to(paint[:, None, None], (3, h, w)).astype(np.float32)
        if volume:
            image = tx.shade(rng, image, mask)
        canvas[:3] += mask * (image - canvas[:3])
        canvas[3] = np.maximum(canvas[3], mask)

    ellipse(0, 1.6, rng.uniform(0.9, 1.6), 1.0, tx.texture(rng, h, w), True)  # shoulders
    ellipse(0, -0.25, 0.95, 1.1, hair)
    for side in (-1, 1):
        ellipse(side * 0.8, rng.uniform(-0.9, 0.1), 0.22, rng.uniform(0.2, 0.5), skin)
    ellipse(0, 0, 0.8, rng.uniform(0.85, 1.1), skin, True)
    white, iris = np.full(3, rng.uniform(0.75, 1.0), np.float32), tx.palette(rng, 1)[0]
    size = rng.uniform(0.12, 0.22)
    for side in (-1, 1):
        ellipse(side * 0.35, -0.15, size, size * 0.75, white)
        ellipse(side * 0.35, -0.15, size * 0.6, size * 0.65, iris)
        ellipse(side * 0.35, -0.15, size * 0.3, size * 0.35, np.zeros(3, np.float32))
        ellipse(side * 0.35, -0.42, size * 1.3, 0.05, dark)
    ellipse(0, 0.2, 0.1, 0.16, mean[:, 0, 0] * 0.7)
    ellipse(0, 0.55, rng.uniform(0.15, 0.4), rng.uniform(0.03, 0.14), dark)
    return canvas


def room_scene(rng: np.random.Generator, h: int, w: int) -> list[Layer]:
    """Boxes, shelves, windows and signs with lettering: straight edges, flat walls."""
    wall = tx.colourise(rng, tx.pattern(rng, h, w) * rng.uniform(0.1, 0.6) + 0.2)
    layers = [Layer(opaque(wall), depth=0.8)]
    for _ in range(int(rng.integers(3, 14))):
        bw, bh = rng.uniform(10, 120), rng.uniform(10, 120)
        x, y, skew = rng.uniform(0, w), rng.uniform(0, h), rng.normal(0, 8)
        points = [(x, y), (x + bw, y + skew), (x + bw, y + bh + skew), (x, y + bh)]
        mask = tx.polygon_mask(h, w, points)
        paint = (
            tx.texture(rng, h, w)
            if rng.random() < 0.5
            else np.broadcast_to(tx.palette(rng, 1)[0][:, None, None], (3, h, w))
        )
        wall = layers[0].canvas[:3]
        if rng.random() < 0.7:
            wall += mask * (paint - wall)
        else:
            layers.append(_moving(rng, np.concatenate([paint, mask[None]]).astype(np.float32), 0.6))
    if rng.random() < 0.6:
        layers.append(_moving(rng, tx.lettering(rng, h, w, int(rng.integers(1, 8))), 0.6))
    return layers


def texture_scene(rng: np.random.Generator, h: int, w: int) -> list[Layer]:
    """One or two textures that drift, turn and ripple: water, cloth, walls, screens."""
    layers = [_moving(rng, opaque(tx.texture(rng, h, w)), 0.8)]
    layers[0].ripple = float(rng.uniform(0, 4))
    if rng.random() < 0.5:
        mask = np.clip((tx.fractal(rng, h, w, 2.0) - 0.5) * rng.uniform(4, 30) + 0.5, 0, 1)
        layers.append(_moving(rng, np.concatenate([tx.texture(rng, h, w), mask[None]]), 1.0))
    return layers


SCENES: tuple[tuple[Callable[[np.random.Generator, int, int], list[Layer]], float], ...] = (
    (leaves_scene, 0.32),
    (landscape_scene, 0.22),
    (face_scene, 0.22),
    (room_scene, 0.14),
    (texture_scene, 0.10),
)


def _camera(rng: np.random.Generator, frames: int) -> Camera:
    time = np.arange(frames)[:, None]
    shift = time * rng.normal(0, 1.5, (1, 2)) * (rng.random() < 0.5)
    if rng.random() < 0.4:
        steps = rng.normal(0, rng.uniform(0.3, 2.0), (frames, 2))
        shake = np.zeros((frames, 2))
        for t in range(1, frames):
            shake[t] = 0.85 * shake[t - 1] + steps[t]
        shift = shift + shake
    roll = time[:, 0] * _speed(rng, 0.004)
    zoom = np.exp(time[:, 0] * _speed(rng, 0.006))
    return Camera(shift, roll, zoom)


def _draw(layer: Layer, camera: Camera, height: int, width: int) -> torch.Tensor:
    """The layer on its path: [frames, 4, height, width]."""
    frames = len(camera.roll)
    time = torch.arange(frames, dtype=torch.float32)
    ax, ay, speed = layer.swing
    dx = time * layer.velocity[0] + ax * torch.sin(time * speed + layer.phase)
    dy = time * layer.velocity[1] + ay * torch.cos(time * speed + layer.phase)
    dx = dx + torch.from_numpy(camera.shift[:, 0]).float() * layer.depth
    dy = dy + torch.from_numpy(camera.shift[:, 1]).float() * layer.depth
    angle = time * layer.turn + torch.from_numpy(camera.roll).float()
    scale = torch.exp(time * layer.zoom) * torch.from_numpy(camera.zoom).float()
    y, x = torch.meshgrid(torch.arange(height) - height / 2, torch.arange(width) - width / 2, indexing="ij")
    cos, sin = (torch.cos(angle) / scale)[:, None, None], (torch.sin(angle) / scale)[:, None, None]
    u = cos * x + sin * y - dx[:, None, None]
    v = -sin * x + cos * y - dy[:, None, None]
    if layer.ripple:
        wave = time[:, None, None] * 0.35 + layer.phase
        u = u + layer.ripple * torch.sin(v / 17 + wave)
        v = v + 0.5 * layer.ripple * torch.sin(u / 23 + wave * 0.8)
    full_h, full_w = layer.canvas.shape[-2:]
    grid = torch.stack([u / (full_w / 2), v / (full_h / 2)], dim=-1).reshape(1, frames * height, width, 2)
    canvas = torch.from_numpy(np.ascontiguousarray(layer.canvas, dtype=np.float32))[None]
    drawn = F.grid_sample(canvas, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
    return drawn[0].reshape(4, frames, height, width).transpose(0, 1)


def _light(rng: np.random.Generator, video: torch.Tensor) -> torch.Tensor:
    """Exposure, colour cast, a moving light or shadow, soft focus and sensor noise, each now and then."""
    frames, _, height, width = video.shape
    time = torch.arange(frames, dtype=torch.float32)[:, None, None, None]
    if rng.random() < 0.5:
        video = video * torch.from_numpy(rng.uniform(0.75, 1.2, (1, 3, 1, 1))).float()
    if rng.random() < 0.5:
        video = video.clamp(0, 1) ** float(rng.uniform(0.6, 1.7))
    if rng.random() < 0.3:
        video = video * (1 + float(rng.uniform(0.05, 0.4)) * torch.sin(time * float(rng.uniform(0.02, 0.3))))
    if rng.random() < 0.35:
        y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
        cx, cy = rng.uniform(-1, 1) + time * rng.normal(0, 0.04), rng.uniform(-1, 1) + time * rng.normal(0, 0.04)
        spot = torch.exp(-((x - cx) ** 2 + (y - cy) ** 2) / float(rng.uniform(0.1, 0.9)))
        video = video * (1 + float(rng.uniform(-0.6, 0.8)) * spot)
    if rng.random() < 0.25:
        video = tx.blur(video, float(rng.uniform(0.6, 2.2)))
    if rng.random() < 0.3:
        noise = torch.from_numpy(rng.standard_normal(video.shape, dtype=np.float32))
        video = video + noise * float(rng.uniform(0.005, 0.04))
    return video.clamp(0, 1)


def _scene(rng: np.random.Generator, frames: int, height: int, width: int) -> torch.Tensor:
    weights = np.array([weight for _, weight in SCENES])
    build = SCENES[rng.choice(len(SCENES), p=weights / weights.sum())][0]
    layers = build(rng, height + 2 * MARGIN, width + 2 * MARGIN)
    camera = _camera(rng, frames)
    video = torch.zeros(frames, 3, height, width)
    for layer in layers:
        drawn = _draw(layer, camera, height, width)
        video = video + drawn[:, 3:] * (drawn[:, :3] - video)
    return _light(rng, video)


def make_clip(seed: int, frames: int, height: int, width: int) -> np.ndarray:
    """One clip, uint8 [frames, 3, height, width]; a pure function of its arguments. One in eight has a hard cut."""
    rng = np.random.default_rng(seed)
    if frames > 8 and rng.random() < 0.125:
        cut = int(rng.integers(4, frames - 3))
        parts = [_scene(rng, cut, height, width), _scene(rng, frames - cut, height, width)]
        video = torch.cat(parts)
    else:
        video = _scene(rng, frames, height, width)
    return (video * 255 + 0.5).to(torch.uint8).numpy()
