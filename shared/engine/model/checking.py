"""Is a model complete and what it says it is? Names and shapes of every part, without reading the data.

``python -m shared.engine.model.checking`` reads ``{"model", "models_dir", "folder", "vae"}`` as JSON from stdin and prints a
JSON list of findings; the command line runs it as a process, because it does not import torch itself.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from shared.engine.model.checkpoints import WeightsError, open_file
from shared.engine.model.dit_files import check_dit
from shared.engine.model.loading import check_vae, load_text_encoder
from shared.engine.plan.model_parts import ModelParts, Part, PartMissingError, find_parts, needed_parts, parts_in
from shared.engine.plan.registry import model_spec, read_variant
from shared.engine.plan.spec import PRESETS, UMT5, ModelSpec, SpecError


def check_model(spec: ModelSpec, parts: ModelParts) -> list[dict[str, Any]]:
    """Per part that the model needs: ``{"part", "path", "tensors", "problems": […]}``; no problems, all is well."""
    found: list[dict[str, Any]] = []
    for part in needed_parts(spec):
        path = parts.found.get(part)
        if path is None:
            found.append({"part": part, "path": None, "tensors": 0, "problems": [parts.complaint(part)]})
            continue
        tensors = 0 if part is Part.TOKENIZER else _count(path)
        problems = _problems(spec, parts, part)
        found.append({"part": part, "path": str(path), "tensors": tensors, "problems": problems})
    return found


def spec_of_folder(folder: Path, model: str | None = None) -> ModelSpec:
    """What a folder holds: as it says itself, by its name, or by the size in its ``config.json``. Raises SpecError."""
    if model is not None or (folder / "spec.json").is_file() or "preset" in read_variant(folder):
        return model_spec(model or folder.name, folder.parent)
    if folder.name in PRESETS:
        return PRESETS[folder.name]
    for config in (folder / "config.json", folder / "transformer" / "config.json"):
        if config.is_file():
            values: Any = json.loads(config.read_text(encoding="utf-8"))
            layers = values.get("num_layers") if isinstance(values, dict) else None
            for spec in PRESETS.values():
                if spec.text == UMT5 and spec.layers == layers:
                    return spec
    raise SpecError(f"{folder} does not say which model it is: add --as NAME, e.g. --as wan2.1-1.3b")


def _count(path: Path) -> int:
    try:
        return len(open_file(path).entries)
    except (WeightsError, FileNotFoundError):
        return 0


def _problems(spec: ModelSpec, parts: ModelParts, part: Part) -> list[str]:
    if part is Part.DIT:
        return check_dit(spec, parts)
    if part in (Part.VAE, Part.TAEHV):
        return check_vae(spec.with_vae("wan" if part is Part.VAE else "taehv") if spec.text == UMT5 else spec, parts)
    if spec.text != UMT5:
        try:
            load_text_encoder(spec, parts)
        except (WeightsError, FileNotFoundError) as error:
            return [str(error)]
        return []
    from shared.engine.model.umt5 import check_tokenizer, check_umt5

    return check_umt5(spec, parts) if part is Part.TEXT else check_tokenizer(parts)


def main() -> int:
    """Answer one request; 0 unless the request itself cannot be answered, which is told as ``{"error": …}``."""
    request: dict[str, Any] = json.loads(sys.stdin.read())
    models_dir = Path(request["models_dir"]) if request.get("models_dir") else None
    try:
        if request.get("folder"):
            folder = Path(request["folder"])
            spec = spec_of_folder(folder, request.get("model"))
            parts = parts_in(folder, spec.name)
        else:
            spec = model_spec(request["model"], models_dir)
            parts = find_parts(request["model"], models_dir)
        spec = spec.with_vae(request.get("vae") or "auto")
        answer: dict[str, Any] = {"model": spec.name, "vae": spec.vae, "findings": check_model(spec, parts)}
    except (SpecError, PartMissingError, json.JSONDecodeError) as error:
        answer = {"error": str(error)}
    sys.stdout.write(json.dumps(answer) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
