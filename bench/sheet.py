"""Contact sheets: the source in the first row, every style below it, a few moments side by side."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

LABEL = 22
"""Pixels above each picture for its name."""
GAP = 6


def contact_sheet(source: Tensor, made: Mapping[str, Tensor], across: int, moments: int, scale: float) -> Image.Image:
    """Clips uint8 [n, H, W, 3]: a first row of the source, then the styles, ``across`` of them in a row.

    Each is shown at ``moments`` times, spread evenly over the clip.
    """
    height, width = (round(side * scale) for side in source.shape[1:3])
    cell = moments * width
    rows = -(-len(made) // across)
    sheet = Image.new("RGB", (across * (cell + GAP) + GAP, (rows + 1) * (height + LABEL + GAP) + GAP), (250, 250, 248))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)

    def put(column: int, row: int, name: str, clip: Tensor, count: int) -> None:
        left, top = GAP + column * (cell + GAP), GAP + row * (height + LABEL + GAP)
        draw.text((left + 2, top + 3), name, (40, 40, 40), font)
        for i in range(count):
            frame = clip[round((i + 0.5) * len(clip) / count - 0.5)]
            picture = Image.fromarray(frame.numpy()).resize((width, height), Image.Resampling.LANCZOS)
            sheet.paste(picture, (left + i * width, top + LABEL))

    put(0, 0, "source", source, max(1, across * cell // width))
    for index, (name, clip) in enumerate(made.items()):
        put(index % across, index // across + 1, name, clip, moments)
    return sheet


def comparison(source: Tensor, rows: Mapping[str, tuple[Tensor, Tensor]]) -> Image.Image:
    """One moment of a clip: per style the source, the true filter and the model; pictures uint8 [H, W, 3]."""
    height, width = source.shape[:2]
    sheet = Image.new("RGB", (3 * width, len(rows) * height))
    for index, (true, made) in enumerate(rows.values()):
        for column, picture in enumerate((source, true, made)):
            sheet.paste(Image.fromarray(picture.numpy()), (column * width, index * height))
    return sheet


def save(image: Image.Image, path: Path) -> None:
    """Writes PNG, JPEG or WebP, by the path's suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, quality=88)
