"""The demo's source: a small drawn scene with a sun, hills, a house and a face that turns, made of nothing but numbers."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np

WIDTH, HEIGHT, FPS = 320, 192, 16
Picture = np.ndarray


def _disc(x: Picture, y: Picture, cx: float, cy: float, rx: float, ry: float) -> Picture:
    """Coverage of an ellipse, 0…1, with a soft edge of about a pixel."""
    distance = np.sqrt(((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2)
    return np.clip((1.0 - distance) * min(rx, ry) + 0.5, 0.0, 1.0)


def _paint(canvas: Picture, mask: Picture, colour: tuple[float, float, float] | Picture) -> None:
    canvas += mask[..., None] * (np.asarray(colour, dtype=np.float32) - canvas)


def frame(index: int, seconds: float) -> Picture:
    """Picture ``index`` of a clip of ``seconds``: uint8 [192, 320, 3]."""
    t = index / (seconds * FPS)
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH].astype(np.float32)
    sky = np.stack([0.95 - 0.55 * (1 - y / HEIGHT), 0.75 - 0.20 * (1 - y / HEIGHT), 0.70 + 0.2 * (1 - y / HEIGHT)], -1)
    canvas = sky.astype(np.float32)
    _paint(canvas, _disc(x, y, 40 + 170 * t, 46 - 20 * np.sin(np.pi * t), 20, 20), (1.0, 0.93, 0.55))
    for shift, height, colour in (
        (0.0, 108, (0.36, 0.50, 0.52)),
        (1.7, 128, (0.28, 0.52, 0.30)),
        (3.1, 150, (0.45, 0.62, 0.24)),
    ):
        drift = x + 26 * t * (1 + shift)
        edge = height + 12 * np.sin(drift / 34 + shift) + 5 * np.sin(drift / 13 + 2 * shift)
        _paint(canvas, np.clip(y - edge + 0.5, 0, 1), colour)
    left = 44 - 18 * t
    _paint(canvas, ((x > left) & (x < left + 58) & (y > 112) & (y < 152)).astype(np.float32), (0.78, 0.40, 0.28))
    roof = (y > 88) & (y < 113) & (np.abs(x - left - 29) < (y - 88) * 1.5)
    _paint(canvas, roof.astype(np.float32), (0.38, 0.16, 0.16))
    _paint(canvas, ((x > left + 10) & (x < left + 24) & (y > 122) & (y < 136)).astype(np.float32), (0.98, 0.92, 0.62))
    _paint(canvas, ((x > left + 36) & (x < left + 48) & (y > 124) & (y < 152)).astype(np.float32), (0.30, 0.18, 0.12))
    _face(canvas, x, y, 226 + 14 * np.sin(2 * np.pi * t), 108 + 3 * np.sin(6 * np.pi * t), 8 * np.sin(2 * np.pi * t), t)
    return (np.clip(canvas, 0, 1) * 255).astype(np.uint8)


def _face(canvas: Picture, x: Picture, y: Picture, cx: float, cy: float, turn: float, t: float) -> None:
    _paint(canvas, _disc(x, y, cx, cy + 78, 52, 42), (0.20, 0.30, 0.55))
    _paint(canvas, _disc(x, y, cx, cy - 8, 44, 54), (0.24, 0.15, 0.10))
    shade = np.clip(0.92 - 0.010 * (x - cx - turn), 0.6, 1.0)[..., None]
    _paint(canvas, _disc(x, y, cx, cy + 4, 36, 46), shade * np.array([0.94, 0.74, 0.60], dtype=np.float32))
    blink = 1.0 if (t * 5) % 1.0 < 0.9 else 0.15
    for side in (-1, 1):
        eye = cx + side * 14 + turn * 0.6
        _paint(canvas, _disc(x, y, eye, cy - 3, 7, 5 * blink), (1.0, 1.0, 1.0))
        _paint(canvas, _disc(x, y, eye + turn * 0.25, cy - 3, 3.4, 4 * blink), (0.12, 0.20, 0.30))
        _paint(canvas, _disc(x, y, eye, cy - 13, 9, 2), (0.24, 0.15, 0.10))
    _paint(canvas, _disc(x, y, cx + turn, cy + 10, 4, 8), (0.82, 0.58, 0.46))
    _paint(canvas, _disc(x, y, cx + turn * 0.7, cy + 27, 13, 3 + 2 * abs(np.sin(8 * np.pi * t))), (0.72, 0.25, 0.28))


def write(path: Path, seconds: float) -> None:
    """Write the clip as an H.264 MP4 of 320×192 at 16 fps."""
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=Fraction(FPS), options={"crf": "16", "preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for index in range(round(seconds * FPS)):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame(index, seconds), format="rgb24")))
        container.mux(stream.encode(None))


def beside(left: Path, right: Path, out: Path) -> None:
    """Two clips of the same size and length side by side, as an H.264 MP4."""
    with (
        av.open(str(left)) as a,
        av.open(str(right)) as b,
        av.open(str(out), "w", options={"movflags": "faststart"}) as container,
    ):
        stream = container.add_stream("libx264", rate=Fraction(FPS), options={"crf": "18", "preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = 2 * WIDTH, HEIGHT, "yuv420p"
        for one, two in zip(a.decode(video=0), b.decode(video=0), strict=False):
            pair = np.concatenate([one.to_ndarray(format="rgb24"), two.to_ndarray(format="rgb24")], axis=1)
            pair = pair.astype(np.uint8, copy=False)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pair, format="rgb24")))
        container.mux(stream.encode(None))
