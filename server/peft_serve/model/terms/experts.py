"""Low-rank terms on the experts of a mixture: W_e + B_e A_e, of the experts that an adapter's tokens reach.

The formula of the experts is the module's own: its eager forward runs on a twin whose stacks of matrices are made
when they are asked for, expert by expert. Base: peft's `ParamWrapper` (LoRA with `target_parameters`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peft_serve.adapters.base import SiteSpec
from peft_serve.adapters.primitives import Edit, ExpertFactors, Experts


@dataclass(frozen=True, slots=True)
class _AdaptedStack:
    """A stack of matrices [E, ., .] with an adapter's terms, as far as it is indexed."""

    weight_E: Tensor
    factors: ExpertFactors
    is_transposed: bool

    def __getitem__(self, expert: Tensor | int) -> Tensor:
        a_RI, b_OR = self.factors.a_ERI[expert], self.factors.b_EOR[expert]
        if self.is_transposed:
            return torch.addmm(self.weight_E[expert], a_RI.t(), b_OR.t())
        return torch.addmm(self.weight_E[expert], b_OR, a_RI)


class ExpertDeltas:
    """What the installed adapters do to one module of experts."""

    def __init__(self, spec: SiteSpec, module: nn.Module) -> None:
        self._spec = spec
        self._module = module
        self._twins: dict[int, nn.Module] = {}
        self._forward = eager_forward(module)

    @property
    def slots(self) -> frozenset[int]:
        return frozenset(self._twins)

    def put(self, slot: int, edit: Edit) -> None:
        if isinstance(edit, Experts) and edit.factors:
            self._twins[slot] = self._twin(edit)

    def drop(self, slot: int) -> None:
        self._twins.pop(slot, None)

    def of(self, slot: int, *args: Any, **kwargs: Any) -> Tensor:
        """The module's forward on tokens of this slot alone."""
        y: Tensor = self._forward(self._twins[slot], *args, **kwargs)
        return y

    def _twin(self, edit: Experts) -> nn.Module:
        twin = copy.copy(self._module)
        stacks: dict[str, Any] = dict(self._module._parameters)
        for name, given in edit.factors.items():
            weight_E = stacks[name]
            factors = ExpertFactors(given.a_ERI.to(weight_E), given.b_EOR.to(weight_E))
            stacks[name] = _AdaptedStack(weight_E.detach(), factors, self._spec.is_transposed)
        twin._parameters = stacks
        return twin


def eager_forward(module: nn.Module) -> Callable[..., Tensor]:
    """The forward that goes through the experts one by one: what transformers' decorator for experts wraps."""
    forward: Callable[..., Tensor] = type(module).forward
    return getattr(forward, "__wrapped__", forward)


def is_stack_of_experts(module: nn.Module) -> bool:
    """Whether this is a module whose forward transformers lets run one expert at a time, matrices indexed by expert.

    Fused experts of another form (all of them multiplied at once) are none.
    """
    num_experts = getattr(module, "num_experts", None)
    parameters = [tuple(p.shape) for _, p in module.named_parameters(recurse=False)]
    return (
        isinstance(num_experts, int)
        and hasattr(type(module).forward, "__wrapped__")
        and any(len(shape) == 3 for shape in parameters)
        and all(shape[0] == num_experts for shape in parameters)
    )
