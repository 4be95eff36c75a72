"""The Wan 2.1 autoencoder (a causal 3D network) for streams: diffusers' modules, the streams' caches held outside.

The caches are large (hundreds of megabytes at 480p), belong to one direction of one stream, and are what has to move when a
stream moves. Sizes are read from the weights, which may have the original Wan names or those of diffusers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan, WanCausalConv3d
from torch import Tensor, nn

from shared.engine.model.checkpoints import Entry, Weights, WeightsError
from shared.engine.model.filling import fill
from shared.engine.plan.spec import FRAMES_PER_LATENT, ModelSpec

_PREFIX = {
    "conv1.": "quant_conv.",
    "conv2.": "post_quant_conv.",
    "encoder.conv1.": "encoder.conv_in.",
    "decoder.conv1.": "decoder.conv_in.",
}
_PART = (
    (".head.0.", ".norm_out."),
    (".head.2.", ".conv_out."),
    (".middle.0.", ".mid_block.resnets.0."),
    (".middle.1.", ".mid_block.attentions.0."),
    (".middle.2.", ".mid_block.resnets.1."),
    (".downsamples.", ".down_blocks."),
    (".residual.0.", ".norm1."),
    (".residual.2.", ".conv1."),
    (".residual.3.", ".norm2."),
    (".residual.6.", ".conv2."),
    (".shortcut.", ".conv_shortcut."),
)
_UPSAMPLE = re.compile(r"^decoder\.upsamples\.(\d+)\.")


@dataclass(slots=True)
class WanMemory:
    """One direction's feature cache of one stream: what each causal convolution has seen last."""

    features: list[Tensor | str | None] = field(default_factory=list)
    started: bool = False

    def clone(self) -> WanMemory:
        """A copy that no later call changes."""
        copied = [f.clone() if isinstance(f, Tensor) else f for f in self.features]
        return WanMemory(copied, self.started)

    def values(self) -> list[Tensor | str | bool | int | None]:
        """All of it, for :meth:`restore`."""
        return [self.started, *self.features]

    def restore(self, values: Sequence[Tensor | str | bool | int | None]) -> None:
        """Become what gave these values. Raises ValueError for those of another kind of memory."""
        started, *features = values
        if not isinstance(started, bool) or not all(f is None or isinstance(f, (Tensor, str)) for f in features):
            raise ValueError("these are no values of the Wan autoencoder's memory")
        self.started, self.features = started, [f if isinstance(f, (Tensor, str)) else None for f in features]

    def nbytes(self) -> int:
        """Bytes held."""
        return sum(f.numel() * f.element_size() for f in self.features if isinstance(f, Tensor))


class WanVae:
    """Encodes and decodes streams chunk by chunk. Holds weights only; for inference."""

    def __init__(self, model: AutoencoderKLWan) -> None:
        self.model = model.eval().requires_grad_(False)
        if model.quant_conv.weight.device.type == "cuda":
            # cuDNN's 3D convolutions want channels last; torch would convert before and behind each of them.
            network: Any = model
            network.to(memory_format=torch.channels_last_3d)
        self._causal = {part: _causal(getattr(model, part)) for part in ("encoder", "decoder")}
        self.dtype = model.quant_conv.weight.dtype

    def new_memory(self) -> WanMemory:
        """One direction's memory of one stream, empty."""
        return WanMemory()

    @torch.inference_mode()
    def encode(self, memory: WanMemory, frames: Tensor) -> Tensor:
        """frames [n, 3, H, W] (uint8, or float in [0, 1]) → the mean, not normalised: [m, C, H/8, W/8].

        A stream's first call takes 1 + 4k frames, later ones 4k. Raises ValueError for other counts.
        """
        count, lead = len(frames), 0 if memory.started else 1
        if count < 1 or (count - lead) % FRAMES_PER_LATENT:
            raise ValueError(f"{count} frames: a chunk has 4n frames, or 4n + 1 where the stream starts")
        if frames.dtype == torch.uint8:
            frames = frames.to(self.dtype) / 255
        video = (frames.to(self.dtype) * 2 - 1).transpose(0, 1)[None]
        parts = video.split([*[1] * lead, *[FRAMES_PER_LATENT] * ((count - lead) // FRAMES_PER_LATENT)], 2)
        moments = torch.cat([self._forward("encoder", memory, part) for part in parts], 2)
        return self.model.quant_conv(moments).chunk(2, 1)[0][0].transpose(0, 1).contiguous()

    @torch.inference_mode()
    def decode(self, memory: WanMemory, latents: Tensor) -> Tensor:
        """latents [m, C, h, w], as the network made them → frames [n, 3, 8h, 8w] in [0, 1]: a stream's first one → 1 frame."""
        return self.decode_unclamped(memory, latents).add_(1).div_(2).clamp_(0, 1)

    @torch.inference_mode()
    def decode_unclamped(self, memory: WanMemory, latents: Tensor) -> Tensor:
        """:meth:`decode` in the network's own range, about [−1, 1], not clamped."""
        z = self.model.post_quant_conv(latents.to(self.dtype).transpose(0, 1)[None])
        frames = [self._forward("decoder", memory, part) for part in z.split(1, 2)]
        return torch.cat(frames, 2)[0].transpose(0, 1).contiguous()

    def _forward(self, part: str, memory: WanMemory, x: Tensor) -> Tensor:
        if not memory.features:
            memory.features = [None] * self._causal[part]
        memory.started = True
        return getattr(self.model, part)(x, feat_cache=memory.features, feat_idx=[0])


def load_wan_vae(
    spec: ModelSpec, weights: Weights, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> WanVae:
    """A WanVae of these tensors. Raises WeightsError for a tensor too few, too many or misshapen."""
    model, weights = wan_vae_on_meta(spec, weights)
    fill(model, weights, device=device, dtype=dtype)
    return WanVae(model)


def wan_vae_on_meta(spec: ModelSpec, weights: Weights) -> tuple[AutoencoderKLWan, Weights]:
    """The network these tensors are of, without data, and the tensors in its words. Raises WeightsError."""
    weights = weights.renamed(lambda name: name.removeprefix("model."))
    if "conv1.weight" in weights.entries:
        blocks = _residual_blocks(weights.entries)
        weights = weights.renamed(lambda name: _diffusers_name(name, blocks))
    try:
        sizes = _sizes(weights.entries)
    except KeyError as error:
        raise WeightsError(
            f"{error.args[0]}: tensor missing in {weights.source}; these are no weights of the Wan autoencoder"
        ) from None
    if sizes["z_dim"] != spec.latent_channels:
        raise WeightsError(
            f"the autoencoder in {weights.source} has {sizes['z_dim']} latent channels, "
            f"{spec.name} has {spec.latent_channels}"
        )
    with torch.device("meta"):
        return AutoencoderKLWan(**sizes), weights


def _causal(module: nn.Module) -> int:
    return sum(isinstance(m, WanCausalConv3d) for m in module.modules())


def _residual_blocks(names: Iterable[str]) -> int:
    """Residual blocks per level of the encoder; the decoder has one more, followed by its first upsampling."""
    ups = sorted(int(m[1]) for name in names if (m := re.match(r"decoder\.upsamples\.(\d+)\.resample\.", name)))
    return (ups[0] if ups else 3) - 1


def _diffusers_name(name: str, blocks: int) -> str:
    """An original Wan name in diffusers' words."""
    if match := _UPSAMPLE.match(name):
        level, index = divmod(int(match[1]), blocks + 2)
        place = f"resnets.{index}" if index <= blocks else "upsamplers.0"
        name = f"decoder.up_blocks.{level}.{place}.{name[match.end() :]}"
    for old, new in _PREFIX.items():
        if name.startswith(old):
            return new + name[len(old) :]
    for old, new in _PART:
        name = name.replace(old, new)
    return name


def _sizes(entries: Mapping[str, Entry]) -> dict[str, Any]:
    """The network's configuration, from its tensors' shapes."""
    base = entries["encoder.conv_in.weight"].shape[0]
    widths: list[int] = []
    times: list[bool] = []
    width, resnets = base, 0
    flat = sorted({int(m[1]) for name in entries if (m := re.match(r"encoder\.down_blocks\.(\d+)\.", name))})
    for index in flat:
        prefix = f"encoder.down_blocks.{index}."
        if f"{prefix}resample.1.weight" in entries:
            widths.append(width)
            times.append(f"{prefix}time_conv.weight" in entries)
        else:
            width = entries[f"{prefix}conv2.weight"].shape[0]
            resnets += 1
    widths.append(width)
    return {
        "base_dim": base,
        "z_dim": entries["quant_conv.weight"].shape[0] // 2,
        "dim_mult": [w // base for w in widths],
        "num_res_blocks": max(resnets // len(widths), 1),
        "temperal_downsample": times,
    }
