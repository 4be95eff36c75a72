"""Begins a DiT with one that was trained on another autoencoder's latents, or on fewer styles.

Both codes are linear maps of the same pixels, so each one's latents are nearly a linear function of the other's. Folded
into the first and the last layer, that makes the old DiT work on the new latents: x0 is the old estimate, translated, and
what the old code could not say is missing from it until training has seen it. The same code louder or softer is the old one,
but for a factor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from shared.engine.model.dit import Dit
from shared.engine.model.head import CELLS, CELLS_OUT, GATES, PATHS
from shared.engine.model.loading import load_tiny_vae
from shared.engine.plan.spec import PATCH, ModelSpec
from training.linear_encoder import LinearCode, measure

SAME = 0.01
"""Two codes are one if the map between them is a multiple of the identity, but for such a share of it (root mean square)."""
CELLS_READ, CELLS_WRITE = "head.cells.near.weight", "head.cells.out.weight"


@dataclass(frozen=True)
class NormalCode:
    """A linear code with its latents' mean and scale [C], as the DiT sees them."""

    code: LinearCode
    mean: Tensor
    scale: Tensor

    def encode(self, video: Tensor) -> Tensor:
        """Clips [B, 4n − 3, 3, H, W] → latents [B·n·h·w, C]."""
        z = self.code.encode(video).movedim(2, -1).flatten(0, -2)
        return (z - self.mean) / self.scale


def code_of(folder: Path) -> tuple[ModelSpec, NormalCode]:
    """The spec of a model folder, and its encoder as a linear map."""
    spec = ModelSpec.from_json(folder / "spec.json")
    code = measure(load_tiny_vae(spec, folder))
    return spec, NormalCode(code, torch.tensor(spec.latent_shift), torch.tensor(spec.latent_scale))


def translation(source: Tensor, target: Tensor, ridge: float = 1e-4) -> Tensor:
    """source [N, C], target [N, D] → the least-squares map [D, C] between them."""
    gram = source.T @ source
    gram = gram + ridge * gram.diagonal().mean() * torch.eye(len(gram))
    return torch.linalg.solve(gram, source.T @ target).T


@torch.no_grad()
def begin_with(model: Dit, new: NormalCode, folder: Path, video: Tensor, fresh: float = 0.5) -> bool:
    """Writes the DiT of ``folder`` into ``model``, which has the same blocks and sees the code ``new``.

    ``video`` [B, 4n − 3, 3, H, W] is what the codes are compared on. ``fresh`` scales the random weights through which
    the model sees what the old code did not. Returns whether gated paths came along; they and the MLP over cells do on the
    same code only (however loud), as gates go channel by channel. Otherwise the model's are shut. Raises ValueError where the
    blocks differ.
    """
    old_spec, old = code_of(folder)
    weights = load_file(folder / "dit.safetensors")
    sizes = ("dim", "ffn_dim", "layers", "heads", "freq_dim", "text_dim", "text_len")
    if differing := [name for name in sizes if getattr(old_spec, name) != getattr(model.spec, name)]:
        raise ValueError(f"{folder}: cannot begin with a DiT of another {', '.join(differing)}")
    z_new, z_old = new.encode(video), old.encode(video)
    there, back = translation(z_new, z_old), translation(z_old, z_new)
    patch, head = "patch_embedding.weight", "head.head.weight"
    width, known = model.spec.dim, old_spec.latent_channels
    unseen = torch.eye(len(back)) - back @ there
    random = torch.empty(width, len(back) * PATCH * PATCH)
    nn.init.xavier_uniform_(random)
    random = random.reshape(width, len(back), PATCH * PATCH) * fresh
    kernel = weights[patch].float().reshape(width, known, PATCH * PATCH)
    kernel = torch.einsum("dop,on->dnp", kernel, there) + torch.einsum("dnp,nm->dmp", random, unseen)
    rows = weights[head].float().reshape(PATCH * PATCH, known, width)
    bias = weights["head.head.bias"].float().reshape(PATCH * PATCH, known)
    state = {name: value.float() for name, value in weights.items()}
    state[patch] = kernel.reshape(model.patch_embedding.weight.shape)
    state[head] = torch.einsum("no,pod->pnd", back, rows).flatten(0, 1)
    state["head.head.bias"] = torch.einsum("no,po->pn", back, bias).flatten()
    own, factor = model.state_dict(), _factor(there)
    same_code = factor is not None
    if factor is not None and CELLS_READ in state:  # gated paths are linear in x_t: they stay
        state[CELLS_READ] *= factor
        state[CELLS_WRITE] /= factor
    _come_along(state, own, CELLS, CELLS_OUT, same_code)
    came_along = _come_along(state, own, PATHS, GATES, same_code)
    model.load_state_dict(state)
    return came_along


def _factor(there: Tensor) -> float | None:
    """What new latents are multiplied by to be old ones, [D, C] → None where the two are not one code."""
    if there.shape[0] != there.shape[1]:
        return None
    factor = float(there.diagonal().mean())
    off = float(torch.dist(there, factor * torch.eye(len(there))))
    return factor if off < SAME * abs(factor) * len(there) ** 0.5 else None


def _come_along(
    state: dict[str, Tensor], own: Mapping[str, Tensor], part: tuple[str, ...], shut: tuple[str, ...], same_code: bool
) -> bool:
    """Whether the old model's ``part`` may stay in ``state``. If not, the model's ``own`` replaces it, with ``shut`` at zero.

    ``part`` and ``shut`` are what names begin with.
    """
    mine = {name: value for name, value in own.items() if name.startswith(part)}
    theirs = {name: state[name] for name in list(state) if name.startswith(part)}
    alike = {name: value.shape for name, value in mine.items()} == {name: value.shape for name, value in theirs.items()}
    if mine and alike and same_code:
        return True
    for name in theirs:
        del state[name]
    state |= {name: torch.zeros_like(value) if name.startswith(shut) else value for name, value in mine.items()}
    return False
