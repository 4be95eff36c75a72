"""Which models there are on this machine, and what they are.

A model is a folder in the models folder: with ``spec.json`` (:class:`~shared.engine.plan.spec.ModelSpec`) for one of our
own, with ``model.json`` for a variant of a preset (``{"preset": "wan2.1-1.3b", "dit": "…"}``, see
:mod:`shared.engine.plan.model_parts`), or with a preset's name and the published files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from shared.engine.plan.spec import PRESETS, UMT5, ModelSpec, SpecError, UnknownModelError

SHIPPED_MODELS = Path(__file__).resolve().parents[2] / "models"
EMBEDDED_MODEL = "rheo-tiny"
PUBLISHED = tuple(name for name, spec in PRESETS.items() if spec.text == UMT5)
"""Presets whose weights are published by others: any models folder may hold them."""


def model_folder(name: str, models_dir: Path | None = None) -> Path:
    """The folder of a model: in ``models_dir`` if it is there, else among those that ship with the package."""
    if not name or name != Path(name).name or name in (".", ".."):
        raise UnknownModelError(f"{name!r} is not a model's name; known: {', '.join(known_models(models_dir))}")
    own = (models_dir or SHIPPED_MODELS) / name
    shipped = SHIPPED_MODELS / name
    return shipped if not own.is_dir() and shipped.is_dir() else own


def known_models(models_dir: Path | None = None) -> list[str]:
    """Names that :func:`model_spec` answers: folders with a spec, here and in the package, and the published presets."""
    roots = [SHIPPED_MODELS] if models_dir is None else [SHIPPED_MODELS, models_dir]
    named = {
        path.parent.name for root in roots for file in ("spec.json", "model.json") for path in root.glob(f"*/{file}")
    }
    return sorted(named | set(PUBLISHED))


def model_spec(name: str, models_dir: Path | None = None) -> ModelSpec:
    """The spec in the model's folder, else the preset of that name. Raises UnknownModelError, SpecError for a bad file."""
    folder = model_folder(name, models_dir)
    if (folder / "spec.json").is_file():
        # The folder's name is the model's: a copied folder is a model of its own.
        return replace(ModelSpec.from_json(folder / "spec.json"), name=name)
    variant = read_variant(folder)
    if "preset" in variant:
        preset = str(variant["preset"])
        if preset not in PRESETS:
            raise SpecError(f"{folder / 'model.json'}: no preset {preset!r}; known: {', '.join(PUBLISHED)}")
        return replace(PRESETS[preset], name=name)
    if name in PUBLISHED or (name in PRESETS and models_dir is not None):
        return PRESETS[name]
    raise UnknownModelError(f"there is no model {name!r} here; known: {', '.join(known_models(models_dir)) or 'none'}")


def read_variant(folder: Path) -> Mapping[str, Any]:
    """``model.json`` of a model's folder; empty where there is none. Raises SpecError for a file that is no JSON object."""
    path = folder / "model.json"
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise SpecError(f"{path} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise SpecError(f"{path} holds no JSON object")
    return cast("dict[str, Any]", values)
