"""The gated layers of Llama and its like, down(act(gate(x)) * up(x)), without the detours of module calls.

The same products, the activation and what it opens in one call and written over the gate. Which modules are meant is
told by the names in their forward, and by a trial.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor, nn

from peft_serve.kernels.row_ops import DTYPES, RowOps

_NAMES: Final = frozenset({"gate_proj", "up_proj", "down_proj", "act_fn"})
_TOLERANCES: Final = {torch.float32: 1e-6, torch.bfloat16: 2**-7}
"""Of the largest number: what another exponential, and one more unit in the last place, come to."""


def gated_forward(module: nn.Module, ops: RowOps) -> Callable[[Tensor], Tensor] | None:
    """A shorter forward of this module, or None where it is another."""
    code = getattr(type(module).forward, "__code__", None)
    if code is None or frozenset(code.co_names) != _NAMES or frozenset(dict(module.named_children())) != _NAMES:
        return None
    if any(part._forward_hooks or part._forward_pre_hooks for part in module.children()):
        return None
    parts: Any = module
    gate, up, down = parts.gate_proj, parts.up_proj, parts.down_proj
    if any(type(part) is not nn.Linear for part in (gate, up, down)):  # quantised ones are theirs to call
        return None
    open_ = _opening(parts.act_fn, gate, ops)

    def forward(x: Tensor) -> Tensor:
        out: Tensor = down.forward(open_(gate.forward(x), up.forward(x)))
        return out

    return forward if _are_close(module.forward, forward, gate) else None


def is_silu(act: object) -> bool:
    """Whether this activation is x / (1 + e^-x)."""
    return type(act).__name__ in {"SiLU", "SiLUActivation"}


def _opening(act: Any, gate: nn.Linear, ops: RowOps) -> Callable[[Tensor, Tensor], Tensor]:
    """act(gate) * up, over the gate; the gate's and up's results are new tensors."""
    weight = gate.weight
    if is_silu(act) and weight.dtype in DTYPES and weight.device.type == "cpu":
        return ops.gate_
    return lambda opened, up: act.forward(opened).mul_(up)


def _are_close(own: Callable[..., Any], shorter: Callable[[Tensor], Tensor], gate: Any) -> bool:
    dtype = gate.weight.dtype
    with torch.inference_mode():
        x_1TI = torch.randn(1, 2, gate.in_features, generator=torch.Generator().manual_seed(0)).to(dtype)
        expected, given = own(x_1TI), shorter(x_1TI)
        return bool((expected - given).abs().max() <= _TOLERANCES.get(dtype, 0) * expected.abs().max())
