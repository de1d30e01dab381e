"""Linear maps, in the form that is fastest where they run."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# The number of rows for which oneDNN chooses its blocked layout: best or equal from 8 rows up, float32 and bfloat16.
PACKED_FOR = 32
# Up to here a single float32 row is worth a second, plain copy of the weight; beyond, memory rules and both are as fast.
PLAIN_COPY_BYTES = 16 * 2**20


class Linear:
    """y = x Wᵀ + b for (T, in) rows. `weight`: (out, in), or None where only the packed form is kept."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight, self._bias = weight, bias

    def __call__(self, states: Tensor) -> Tensor:
        return F.linear(states, self._weight, self._bias)

    def add_to(self, residual: Tensor, states: Tensor) -> Tensor:
        """residual + x Wᵀ + b."""
        return residual + self(states)


class PackedLinear(Linear):
    """The same on a CPU, with the weight reordered once into oneDNN's blocks and the residual added as it is written.

    One float32 row is quicker by the plain weight, which is kept for it where it is small.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(weight, bias)
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), PACKED_FOR)
        plain = weight.dtype == torch.float32 and bias is None and weight.nbytes <= PLAIN_COPY_BYTES
        self._single = weight.t() if plain else None
        self._weight = None

    def __call__(self, states: Tensor) -> Tensor:
        if self._single is not None and len(states) == 1:
            return torch.mm(states, self._single)
        return torch.ops.mkldnn._linear_pointwise(states, self._packed, self._bias, "none", [], "")

    def add_to(self, residual: Tensor, states: Tensor) -> Tensor:
        if self._single is not None and len(states) == 1:
            return torch.addmm(residual, states, self._single)
        return torch.ops.mkldnn._linear_pointwise.binary(states, residual, self._packed, self._bias, "add")


class Modules:
    """Several modules that share their input, called as they are, one after the other: quantised layers, adapters."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._modules = modules

    def __call__(self, states: Tensor) -> Tensor:
        parts = [module(states) for module in self._modules]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def add_to(self, residual: Tensor, states: Tensor) -> Tensor:
        """residual + their output."""
        return residual + self(states)


def fused_weight(modules: Sequence[nn.Module]) -> Tensor | None:
    """(sum of outs, in) of plain modules without biases; None where there is anything else."""
    if not all(_plain(module) and module.bias is None for module in modules):
        return None
    return torch.cat([module.weight.detach() for module in modules])


def _plain(module: nn.Module) -> bool:
    return type(module) is nn.Linear and type(module.weight) is nn.Parameter  # torchao swaps the weight's type only


def fuse(modules: Sequence[nn.Module], *, packed: bool) -> Linear | Modules:
    """One map (T, in) → (T, sum of outs) of modules that share their input.

    Args:
        modules: plain ones give their weights up, so that no weight is held twice.
        packed: reorder the weights for oneDNN; see `packing_works`.
    """
    if not all(map(_plain, modules)):
        return Modules(modules)
    weights = [module.weight.detach() for module in modules]
    biases = [module.bias for module in modules]
    weight = weights[0] if len(weights) == 1 else torch.cat(weights)
    bias = None if biases[0] is None else torch.cat(biases).detach()
    for module in modules:
        module.weight = nn.Parameter(weight.new_empty(0), requires_grad=False)
    return PackedLinear(weight, bias) if packed else Linear(weight, bias)


def packing_works(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether this build and processor have oneDNN's packed linear for `dtype`, and it computes what F.linear does."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    states = torch.randn(4, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    try:
        found = PackedLinear(weight, None).add_to(torch.zeros(4, 32, dtype=dtype), states)
    except (AttributeError, RuntimeError):  # private operators: another torch may lack them
        return False
    return torch.allclose(found.float(), states.float() @ weight.float().T, atol=0.2, rtol=0.05)
