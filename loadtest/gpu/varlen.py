"""torch's attention over rows whose keys lie side by side (`torch.nn.attention.varlen`), as every version that has the
function computes it: a second opinion on our kernel, by somebody else's."""

import inspect
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from peft_serve.model.attend import Terms
from peft_serve.model.pools import KVPool, places_of
from peft_serve.model.ragged import Plan

_ANY = -1


def side_by_side(
    plan: Plan, pool: KVPool, q_THD: Tensor, terms: Terms, attend: Callable[..., Tensor] | None = None
) -> Callable[[], Tensor] | None:
    """Attention of a plan's rows over copies of their keys and values, made here and not by the call; None where torch
    has it not for such rows. `attend` stands in for torch's."""
    if attend is None and (not q_THD.is_cuda or q_THD.dtype is torch.float32):
        return None
    try:
        function: Any = attend or import_module("torch.nn.attention.varlen").varlen_attn
    except (ImportError, AttributeError):
        return None
    spans, device = plan.spans, q_THD.device
    stops = [span.stop for span in spans]
    places = [at for span in spans for at in places_of(span.blocks, 0, span.stop, pool.block_size)]
    keys, values = (each[torch.tensor(places, device=device)] for each in pool.layer(0))
    more: dict[str, Any] = {"scale": terms.scaling}
    if "enable_gqa" in inspect.signature(function).parameters:  # else it asks for nothing
        more["enable_gqa"] = q_THD.shape[1] != keys.shape[1]
    more["window_size"] = (_ANY if terms.window is None else terms.window - 1, 0)
    lines = _ends([span.num_tokens for span in spans], device), _ends(stops, device)
    most = max(span.num_tokens for span in spans), max(stops)

    def act() -> Tensor:
        out: Tensor = function(q_THD, keys, values, *lines, *most, **more)
        return out

    try:
        act()
    except (RuntimeError, TypeError, ValueError):
        return None
    return act


def _ends(lengths: list[int], device: torch.device) -> Tensor:
    """Where each row begins, and where the last one ends."""
    return torch.tensor([0, *lengths], dtype=torch.int32, device=device).cumsum(0, dtype=torch.int32)
