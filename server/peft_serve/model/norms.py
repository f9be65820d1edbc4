"""RMS norms of the base in one call.

The models of transformers spell the norm out in six operations. torch has the whole of it as one, with the same
operations inside; a kernel of our own takes a fifth of torch's time for one row, in another order of its sum. Whether a
module is that formula is found out by asking it: some multiply by 1 + w, some round between the operations.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm

from peft_serve.kernels import row_ops
from peft_serve.kernels.row_ops import DTYPES, RowOps

_EPSILONS: Final = ("variance_epsilon", "eps")
_SCALES: Final = (1e-4, 1.0, 30.0)  # the smallest lets epsilon count
_TOLERANCES: Final = {torch.float32: 4e-6, torch.bfloat16: 2**-7}
"""Of the largest number: what another order of a float32 sum comes to, or one unit in the last place."""
_MAX_OTHERS: Final = 0.01  # of the numbers in bfloat16: those that such a sum has rounded the other way

Norm = Callable[[Tensor], Tensor]


def norm_forward(module: nn.Module) -> Callable[..., Any]:
    """The module's own forward, or one call that gives the same bits."""
    facts = _facts(module)
    if facts is None or not type(module).__name__.endswith("RMSNorm"):
        return module.forward
    gain, epsilon = facts
    fused = _taking_any(lambda x: rms_norm(x, gain.shape, gain, epsilon))
    return fused if _are_close(module.forward, fused, gain, tolerance=0) else module.forward


def kernel_norm(module: nn.Module, own: Callable[..., Any], ops: RowOps) -> row_ops.Norm | None:
    """The norm by which the kernel gives what the module's `own` forward gives, to its dtype's rounding; None: none."""
    facts = _facts(module)
    if facts is None or facts[0].dtype not in DTYPES:
        return None
    weight, epsilon = facts
    for offset in (0, 1):
        gain = weight + offset if offset else weight
        fused = _taking_any(ops.rms_norm(gain, epsilon))
        if _are_close(own, fused, gain, tolerance=_TOLERANCES[gain.dtype]):
            return row_ops.Norm(gain.contiguous(), epsilon, offset)
    return None


def run_by(norm: row_ops.Norm, ops: RowOps) -> Callable[..., Any]:
    """The kernel's call, whatever its argument is called."""
    return _taking_any(ops.rms_norm(norm.gain, norm.epsilon))


def _facts(module: nn.Module) -> tuple[Tensor, float] | None:
    """Weight and epsilon of what may be an RMS norm on a CPU."""
    weight = getattr(module, "weight", None)
    epsilon = next((e for name in _EPSILONS if isinstance(e := getattr(module, name, None), float)), None)
    if not isinstance(weight, Tensor) or weight.device.type != "cpu" or epsilon is None:
        return None
    if getattr(module, "bias", None) is not None or len(inspect.signature(type(module).forward).parameters) != 2:
        return None
    return weight.detach(), epsilon


def _taking_any(norm: Norm) -> Callable[..., Any]:
    """The same, whatever its argument is called."""

    def forward(*args: Tensor, **kwargs: Tensor) -> Tensor:
        (x,) = args or kwargs.values()
        return norm(x)

    return forward


def _are_close(own: Callable[..., Any], fused: Callable[..., Any], like_D: Tensor, *, tolerance: float) -> bool:
    """Whether both give the same for a few random rows of several sizes."""
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        for scale in _SCALES:
            x = (scale * torch.randn(1, 40, len(like_D), generator=generator)).to(like_D.dtype)
            expected, given = own(x), fused(x)
            if expected.dtype != given.dtype or expected.shape != given.shape:
                return False
            if float((expected - given).abs().max()) > tolerance * float(expected.abs().max()):
                return False
            if expected.dtype is torch.bfloat16 and float((expected != given).float().mean()) > _MAX_OTHERS:
                return False
    return True
