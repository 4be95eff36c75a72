"""Where the parts of a model are: the DiT, the autoencoders, the text encoder and its tokenizer. Imports no torch.

Files keep the names they are published under, and the folders the arrangement they are downloaded in. A part is the first
of these that exists:

1. what a setting names (``RHEOCAST_DIT``, ``RHEOCAST_VAE_WEIGHTS``, ``RHEOCAST_TEXT_WEIGHTS``): a file, or a folder;
2. what ``model.json`` in the model's folder names, relative to that folder: ``{"dit": "…", "vae": "…", "taehv": "…",
   "text": "…", "tokenizer": "…"}``, each a file or a folder;
3. the model's folder, ``<models>/<name>``, and for a ``-fast`` profile that of the model it is a profile of;
4. for the published models the folders of StreamDiffusionV2 (``ckpts/wan_causal_dmd_v2v``, ``wan_models/Wan2.1-T2V-1.3B``,
   with or without their parents), so that a checkout of it serves as the models folder.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from shared.engine.plan.registry import model_folder, read_variant
from shared.engine.plan.spec import UMT5, ModelSpec, SpecError, VaeKind


class Part(StrEnum):
    """What a model consists of."""

    DIT = "dit"
    VAE = "vae"  # the full Wan autoencoder
    TAEHV = "taehv"  # the tiny one
    TEXT = "text"
    TOKENIZER = "tokenizer"


FILES: Mapping[Part, tuple[str, ...]] = {
    Part.DIT: ("dit.safetensors", "model.pt", "diffusion_pytorch_model", "transformer/diffusion_pytorch_model"),
    Part.VAE: ("vae.safetensors", "Wan2.1_VAE.pth", "Wan2.1_VAE.safetensors", "vae/diffusion_pytorch_model"),
    Part.TAEHV: ("vae.safetensors", "taew2_1.safetensors", "taew2_1.pth"),
    Part.TEXT: (
        *("text.safetensors", "models_t5_umt5-xxl-enc-bf16.pth", "models_t5_umt5-xxl-enc-bf16.safetensors"),
        "text_encoder/model",
    ),
    Part.TOKENIZER: ("tokenizer", "google/umt5-xxl", "."),
}
"""Names to look for, in order; one without a suffix stands for ``.safetensors`` or its ``.safetensors.index.json``."""
_BARE: Mapping[Part, tuple[str, ...]] = {Part.VAE: ("diffusion_pytorch_model",), Part.TEXT: ("model",)}
"""Names that say too little: looked for in a folder that was named for this very part, not in a model's."""
_TOKENIZER_FILES = ("tokenizer.json", "spiece.model", "tokenizer_config.json")

# Folders in which the published models come, beside their own: the generator's, and the base model's.
_GENERATORS = {"wan2.1-1.3b": "wan_causal_dmd_v2v", "wan2.1-14b": "wan_causal_dmd_v2v_14b"}
_BASES = {"wan2.1-1.3b": "Wan2.1-T2V-1.3B", "wan2.1-14b": "Wan2.1-T2V-14B"}


class PartMissingError(FileNotFoundError):
    """A part of a model is nowhere; the message names its files and where they may be put."""


@dataclass(frozen=True, slots=True)
class ModelParts:
    """The parts of one model that were found, and for each part where it was looked for."""

    model: str
    found: Mapping[Part, Path]
    searched: Mapping[Part, tuple[Path, ...]]

    def need(self, part: Part) -> Path:
        """The file (the folder, of the tokenizer). Raises PartMissingError."""
        if part in self.found:
            return self.found[part]
        raise PartMissingError(self.complaint(part))

    def complaint(self, part: Part) -> str:
        """One line about a part that is missing: what was looked for, where, and what to do."""
        first, *rest = self.searched[part]
        names = ", ".join(_shown(name) for name in FILES[part] if name != ".")
        others = f" (nor in {', '.join(str(folder) for folder in rest)})" if rest else ""
        return f"{self.model}: no {part} weights in {first}{others}: put one of {names} there{_hint(self.model)}"


def needed_parts(spec: ModelSpec) -> tuple[Part, ...]:
    """What a model with this spec consists of."""
    vaes = {VaeKind.WAN: (Part.VAE,), VaeKind.TAEHV: (Part.TAEHV,), VaeKind.MIXED: (Part.VAE, Part.TAEHV)}
    text = (Part.TEXT, Part.TOKENIZER) if spec.text == UMT5 else (Part.TEXT,)
    return (Part.DIT, *vaes[VaeKind(spec.vae)], *text)


def base_of(model: str) -> str:
    """The published model that a profile is a profile of; any other name is its own."""
    base = model.removesuffix("-fast")
    return base if base in _GENERATORS else model


def find_parts(
    model: str, models_dir: Path | None = None, overrides: Mapping[Part, Path | None] | None = None
) -> ModelParts:
    """Look for every part of a model by name. ``overrides`` are files or folders that settings name.

    Raises SpecError for a ``model.json`` that is none, PartMissingError for a path that was named and does not exist.
    """
    folder = model_folder(model, models_dir)
    root = models_dir or folder.parent
    named = {part: path for part, path in (overrides or {}).items() if path is not None}
    variant = read_variant(folder)
    for part in Part:
        value = variant.get(part.value)
        if value is not None and not isinstance(value, str):
            raise SpecError(f"{folder / 'model.json'}: {part.value} must be a path")
        if value and part not in named:
            named[part] = folder / Path(value).expanduser()
    family = base_of(str(variant.get("preset", model)))
    searched = {part: _folders(part, folder, root, family, named) for part in Part}
    found = {part: path for part in Part if (path := _find(part, searched[part], part in named))}
    return ModelParts(model, found, searched)


def parts_in(folder: Path, model: str) -> ModelParts:
    """The parts in one folder, whatever it is called."""
    values = read_variant(folder)
    named = {part: folder / str(values[part.value]) for part in Part if part.value in values}
    searched = {part: (named.get(part, folder),) for part in Part}
    found = {part: path for part in Part if (path := _find(part, searched[part], part in named))}
    return ModelParts(model, found, searched)


def find_file(folder: Path, names: tuple[str, ...]) -> Path | None:
    """The first of these files in a folder; a name without a suffix stands for safetensors, in one file or in shards."""
    for name in names:
        for suffix in ("",) if Path(name).suffix else (".safetensors", ".safetensors.index.json"):
            if (path := folder / f"{name}{suffix}").is_file():
                return path
    return None


def _folders(part: Part, folder: Path, root: Path, family: str, named: Mapping[Part, Path]) -> tuple[Path, ...]:
    """Where to look for a part, in order. What was named is looked at alone; a tokenizer lies beside its text encoder."""
    if path := named.get(part) or (named.get(Part.TEXT) if part is Part.TOKENIZER else None):
        if not path.exists():
            raise PartMissingError(f"the {part} weights are said to be at {path}, but nothing is there")
        return (path.parent, path.parent.parent) if part is Part.TOKENIZER and path.is_file() else (path,)
    folders = [folder, root / family] if family in _GENERATORS else [folder]
    if family in _GENERATORS:
        generator, base = _GENERATORS[family], _BASES[family]
        if part is Part.DIT:
            folders += [root / "ckpts" / generator, root / generator]
        elif part is Part.TAEHV:
            folders += [root / "ckpts", root]
        else:
            folders += [root / "wan_models" / base, root / base, root / f"{base}-Diffusers"]
    return tuple(dict.fromkeys(folders))


def _find(part: Part, folders: tuple[Path, ...], named: bool) -> Path | None:
    names = FILES[part] + (_BARE.get(part, ()) if named else ())
    for folder in folders:
        if folder.is_file():
            return folder
        if part is Part.TOKENIZER:
            for name in names:
                if any((folder / name / file).is_file() for file in _TOKENIZER_FILES):
                    return folder / name
        elif path := find_file(folder, names):
            return path
    return None


def _shown(name: str) -> str:
    return name if Path(name).suffix or name in FILES[Part.TOKENIZER] else f"{name}.safetensors"


def _hint(model: str) -> str:
    return f", or run: rheocast models fetch {model}" if base_of(model) in _GENERATORS else ""
