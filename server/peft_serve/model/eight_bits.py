"""Linear layers of a base whose weights were brought to 8 bits when it was loaded (`--quantisation int8`, `fp8`).

Only weights are rounded, never what they are multiplied with: a row meets the same matrix whatever stands beside it,
and that matrix can be told (`EightBitLinear.matrix`) to whatever compiles an adapter against it. Knows no site.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Final, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from peft_serve.kernels.eight_bits import Code, Coded, coded, decoded, multiplied

_FEWEST_OUTPUTS: Final = 16  # a gate of fewer decides more than it weighs
_BY_NAME: Final = frozenset({"FalconLinear"})  # a Linear that adds its bias later


class EightBitProduct(Protocol):
    """Multiplies by weights of 8 bits: a kernel."""

    def multiply(self, x: Tensor, weight: Coded, bias_O: Tensor | None) -> Tensor:
        """x W^T + b of x [..., I], a new tensor."""
        ...


class EightBitLinear(nn.Linear):
    """A Linear whose `weight` holds 8 bits for each number, and `steps` what they are counted in."""

    steps: Tensor

    def __init__(self, weight: Coded, bias_O: Tensor | None) -> None:
        nn.Module.__init__(self)  # the parent's would make a weight of full size
        self.in_features, self.out_features = weight.num_in, weight.num_out
        self.weight = nn.Parameter(weight.values_OI, requires_grad=False)
        self.bias = None if bias_O is None else nn.Parameter(bias_O, requires_grad=False)  # type: ignore[assignment]
        self.register_buffer("steps", weight.steps_O)
        self.code = weight.code
        self._kernel: EightBitProduct | None = None

    @property
    def coded(self) -> Coded:
        """The weight."""
        return Coded(self.weight.detach(), self.steps, self.code)

    def matrix(self) -> Tensor:
        """[O, I] float32: what the layer multiplies by, exactly."""
        return decoded(self.coded, torch.float32)

    def run_by(self, kernel: EightBitProduct) -> None:
        """Multiply by a kernel from now on."""
        self._kernel = kernel

    def forward(self, input: Tensor) -> Tensor:
        product = multiplied if self._kernel is None else self._kernel.multiply
        return product(input, self.coded, self.bias)


def store_in_eight_bits(model: PreTrainedModel, code: Code, device: torch.device) -> None:
    """Put a model on a device, the linear layers of its body in 8 bits: each goes there by itself, so that the device
    never holds the whole model in full.

    Embeddings, norms, experts, heads and what shares a weight with them stay as they are. ValueError where nothing is
    left, or where a layer cannot be rounded.
    """
    paths = list(_paths(model))
    if not paths:
        raise ValueError(
            f"a model of type {model.config.model_type!r} has no linear layers that can be stored in 8 bits; leave "
            "--quantisation out"
        )
    made: dict[nn.Module, EightBitLinear] = {}
    for path in paths:
        module = model.get_submodule(path)
        assert isinstance(module, nn.Linear)
        if module not in made:
            made[module] = _made(path, module, code, device)
        model.set_submodule(path, made[module])
    model.to(device)


def eight_bit_layers(model: nn.Module) -> Iterator[EightBitLinear]:
    """Every layer of this kind, once."""
    return (module for module in model.modules() if isinstance(module, EightBitLinear))


def _made(path: str, module: nn.Linear, code: Code, device: torch.device) -> EightBitLinear:
    try:
        weight = coded(module.weight.detach().to(device), code)
    except ValueError as error:
        raise ValueError(f"the weight of {path} cannot be stored in 8 bits: {error}") from error
    bias_O = None if module.bias is None else module.bias.detach().to(device)
    module.weight = nn.Parameter(torch.empty(0), requires_grad=False)  # its memory goes now, not with the module
    return EightBitLinear(weight, bias_O).train(module.training)


def _paths(model: PreTrainedModel) -> Iterator[str]:
    """Linear layers of the body, by every path they have."""
    body: nn.Module = model.base_model
    prefix = next((path for path, module in model.named_modules() if module is body), "")
    head = model.get_output_embeddings()
    uses = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
    for path, module in body.named_modules(remove_duplicate=False):
        is_plain = type(module) is nn.Linear or type(module).__name__ in _BY_NAME
        if not is_plain or module is head:
            continue
        assert isinstance(module, nn.Linear)
        if module.out_features >= _FEWEST_OUTPUTS and uses[id(module.weight)] == 1:
            yield f"{prefix}.{path}" if prefix else path
