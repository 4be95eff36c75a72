"""Linear layers in oneDNN's own weight layout, for serving on a CPU.

Measured on a processor with AVX-512 (docs/benchmarks.md): a tenth faster than the ordinary product in float32, with the MLP's
GELU computed on the way out. Its bits depend neither on the number of rows nor on the thread count. It costs a second copy of
the weights; the ordinary ones stay, under their names, for whoever changes them (:meth:`PackedLinear.repack`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from shared.engine.model.dit import Dit

_DTYPES = (torch.float32, torch.bfloat16)


@torch.library.custom_op("rheocast::packed_linear", mutates_args=())
def _packed_linear(x: Tensor, packed: Tensor, bias: Tensor | None, rows: int, gelu: bool) -> Tensor:
    """The product as one opaque operator, which the compiler leaves alone. ``rows`` is the number of output channels."""
    return _multiply(x, packed, bias, gelu)


@_packed_linear.register_fake
def _(x: Tensor, packed: Tensor, bias: Tensor | None, rows: int, gelu: bool) -> Tensor:
    return x.new_empty(*x.shape[:-1], rows)


def _multiply(x: Tensor, packed: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
    operators: Any = torch.ops.mkldnn
    return operators._linear_pointwise(x, packed, bias, "gelu" if gelu else "none", [], "tanh" if gelu else "")


class PackedLinear(nn.Linear):
    """A linear layer, optionally followed by a tanh GELU. Shares its parameters with the layer it was made of."""

    packed: Tensor

    def __init__(self, plain: nn.Linear, *, gelu: bool = False) -> None:
        with torch.device("meta"):
            super().__init__(plain.in_features, plain.out_features, bias=False)
        self.weight, self.bias, self.gelu = plain.weight, plain.bias, gelu
        self.repack()

    def repack(self) -> None:
        """The weight has changed."""
        operators: Any = torch.ops.mkldnn
        self.packed = operators._reorder_linear_weight(self.weight.detach(), None)

    def forward(self, input: Tensor) -> Tensor:
        """[..., in] → [..., out]."""
        if torch.compiler.is_compiling():
            return _packed_linear(input, self.packed, self.bias, self.out_features, self.gelu)
        return _multiply(input, self.packed, self.bias, self.gelu)


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this torch, and this CPU, have oneDNN's packed product for the device and dtype: bfloat16 needs AVX-512."""
    operators: Any = torch.ops.mkldnn
    if device.type != "cpu" or dtype not in _DTYPES:
        return False
    if not torch.backends.mkldnn.is_available() or not hasattr(operators, "_linear_pointwise"):
        return False
    return dtype != torch.bfloat16 or bool(operators._is_mkldnn_bf16_supported())


def pack(model: Dit) -> None:
    """Pack the linear layers that a forward runs for every token, in place, after :meth:`Dit.fuse`."""
    for block in model.layers():
        attention, cross, mlp = block.self_attn, block.cross_attn, block.ffn
        if attention.qkv is not None:
            attention.qkv = PackedLinear(attention.qkv)
        attention.o, cross.q, cross.o = (PackedLinear(plain) for plain in (attention.o, cross.q, cross.o))
        block.ffn = nn.Sequential(
            PackedLinear(_linear(mlp[0]), gelu=True), nn.Identity(), PackedLinear(_linear(mlp[2]))
        )
    if model.is_last:
        head = model.head
        head.head = PackedLinear(head.head)
        if head.gated_paths:
            head.paths, head.gates = PackedLinear(head.paths), PackedLinear(head.gates)
        if (cells := head.cells) is not None:
            for name in ("near", "token", "mix", "out"):
                setattr(cells, name, PackedLinear(_linear(getattr(cells, name))))


def repack(model: nn.Module) -> None:
    """Some weights have changed in place."""
    for module in model.modules():
        if isinstance(module, PackedLinear):
            module.repack()


def _linear(module: nn.Module) -> nn.Linear:
    if not isinstance(module, nn.Linear):
        raise TypeError(f"{type(module).__name__} is no linear layer")
    return module
