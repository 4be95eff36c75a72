"""``python -m bench.thumbnails``: a model's ``styles.json`` and a small picture for each style, beside its weights.

The picture is a clip that training's own procedure draws, restyled as a viewer would get it; nothing comes from elsewhere.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from bench.quality import PROMPTS
from bench.rig import Rig
from shared.engine.plan.registry import EMBEDDED_MODEL, model_folder
from shared.engine.plan.spec import ModelSpec
from training.filters import NO_STYLE
from training.procedural import make_clip
from training.prompts import PHRASES

WIDTH, HEIGHT = 160, 96
EXAMPLES = 4  # phrases beside the plainest prompt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=EMBEDDED_MODEL)
    parser.add_argument("--seed", type=int, default=7, help="Of the drawn clip.")
    parser.add_argument("--out", type=Path, help="Default: the model's folder.")
    args = parser.parse_args()
    folder = model_folder(args.model)
    spec = ModelSpec.from_json(folder / "spec.json")
    out: Path = args.out or folder
    drawn = make_clip(args.seed, 6, spec.default_height, spec.default_width)
    held = np.concatenate([drawn[:5], np.repeat(drawn[4:5], 8, axis=0)])  # what stands still is drawn best
    clip = torch.from_numpy(held).permute(0, 2, 3, 1)
    rig = Rig(spec, folder, steps=2, seed=0)
    (out / "styles").mkdir(parents=True, exist_ok=True)
    styles: list[dict[str, object]] = []
    for style in [*(style for style in PROMPTS if style != NO_STYLE), NO_STYLE]:
        prompt = PROMPTS[style]
        name = re.sub(r"[^a-z0-9]+", "-", style.lower()).strip("-")
        picture = Image.fromarray(rig.restyle(clip.contiguous(), prompt)[-1].numpy())
        small = picture.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)
        small.save(out / "styles" / f"{name}.webp", quality=72, method=6)
        phrases = [phrase for phrase in PHRASES.get(style, ()) if phrase and phrase != prompt][:EXAMPLES]
        styles.append({"name": style, "prompts": [prompt, *phrases]})
    text = json.dumps({"styles": styles}, indent=1, ensure_ascii=False) + "\n"
    (out / "styles.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
