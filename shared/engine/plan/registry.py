"""Which models there are on this machine, and where. A model is a folder with ``spec.json`` and its weights."""

from __future__ import annotations

from pathlib import Path

from shared.engine.plan.spec import PRESETS, ModelSpec, UnknownModelError

SHIPPED_MODELS = Path(__file__).resolve().parents[2] / "models"
EMBEDDED_MODEL = "rheo-tiny"


def model_folder(name: str, models_dir: Path | None = None) -> Path:
    """The folder of a model: in ``models_dir`` if given, else among those that ship with the package."""
    if not name or name != Path(name).name:
        raise UnknownModelError(f"{name!r} is not a model's name; known: {', '.join(known_models(models_dir))}")
    return (models_dir or SHIPPED_MODELS) / name


def known_models(models_dir: Path | None = None) -> list[str]:
    """Names of the models whose folder holds a spec."""
    root = models_dir or SHIPPED_MODELS
    return sorted(path.parent.name for path in root.glob("*/spec.json"))


def model_spec(name: str, models_dir: Path | None = None) -> ModelSpec:
    """The spec in the model's folder, else the preset of that name. Raises UnknownModelError with the known names."""
    path = model_folder(name, models_dir) / "spec.json"
    if path.is_file():
        return ModelSpec.from_json(path)
    if name in PRESETS and models_dir is not None:
        return PRESETS[name]
    raise UnknownModelError(f"there is no model {name!r} here; known: {', '.join(known_models(models_dir)) or 'none'}")
