"""RMS norms of the base in one call.

The models of transformers spell the norm out in six operations. torch has the whole of it as one, with the same
operations inside and a quarter less time on a CPU. Whether a module is that formula is found out by asking it: some
multiply by 1 + w, some round between the operations.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm

_EPSILONS: Final = ("variance_epsilon", "eps")
_SCALES: Final = (1e-4, 1.0, 30.0)  # the smallest lets epsilon count


def norm_forward(module: nn.Module) -> Callable[..., Any]:
    """The module's own forward, or one call that gives the same bits."""
    own = module.forward
    weight = getattr(module, "weight", None)
    epsilon = next((e for name in _EPSILONS if isinstance(e := getattr(module, name, None), float)), None)
    if not isinstance(weight, Tensor) or weight.device.type != "cpu" or epsilon is None:
        return own
    if not type(module).__name__.endswith("RMSNorm") or len(inspect.signature(own).parameters) != 1:
        return own
    gain = weight.detach()

    def fused(*args: Tensor, **kwargs: Tensor) -> Tensor:
        (x,) = args or kwargs.values()
        return rms_norm(x, gain.shape, gain, epsilon)

    return fused if _are_equal(own, fused, gain) else own


def _are_equal(own: Callable[[Tensor], Any], fused: Callable[[Tensor], Tensor], like_D: Tensor) -> bool:
    """Whether both give the same bits for a few random rows of several sizes."""
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        for scale in _SCALES:
            x = (scale * torch.randn(1, 5, len(like_D), generator=generator)).to(like_D.dtype)
            expected, given = own(x), fused(x)
            if expected.dtype != given.dtype or not torch.equal(expected, given):
                return False
    return True
