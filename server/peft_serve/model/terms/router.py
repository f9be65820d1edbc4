"""A low-rank term on the router of a mixture: each adapter's tokens choose their experts by W + B A.

The formula of the choice is the module's own: its forward runs on a twin with the weight exchanged. The weight is made
when it is asked for, as peft does it (`ParamWrapper`, LoRA with `target_parameters`): it is small, and there may be
many adapters.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from peft_serve.adapters.primitives import Affine, Edit, LowRank


class RouterDeltas:
    """What the installed adapters do to one router."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._deltas: dict[int, LowRank] = {}

    @property
    def slots(self) -> frozenset[int]:
        return frozenset(self._deltas)

    def put(self, slot: int, edit: Edit) -> None:
        if isinstance(edit, Affine) and edit.delta is not None:
            weight_EI = self._weight_EI
            self._deltas[slot] = LowRank(edit.delta.a_RI.to(weight_EI), edit.delta.b_OR.to(weight_EI))

    def drop(self, slot: int) -> None:
        self._deltas.pop(slot, None)

    def of(self, slot: int, x: Tensor) -> Any:
        """What the module says of tokens of this slot alone."""
        delta = self._deltas[slot]
        twin = copy.copy(self._module)
        parameters: dict[str, Any] = dict(self._module._parameters)
        parameters["weight"] = torch.addmm(self._weight_EI, delta.b_OR, delta.a_RI)
        twin._parameters = parameters
        return type(self._module).forward(twin, x)

    @property
    def _weight_EI(self) -> Tensor:  # noqa: N802 - the suffix names dimensions
        weight = self._module.weight
        assert isinstance(weight, Tensor)
        return weight.detach()
