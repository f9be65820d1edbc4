"""What makes a module of a model a site, and what is known of it: its kind, its sizes and its parameters."""

from __future__ import annotations

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peft_serve.adapters.base import SiteKind, SiteSpec
from peft_serve.model.attention_site import attention_spec
from peft_serve.model.expert_site import expert_spec
from peft_serve.model.quantised import logical_shapes
from peft_serve.model.router_site import router_spec


def spec_of(path: str, module: nn.Module) -> SiteSpec | None:
    """The site a module is, if it is one.

    An embedding whose forward is more than a scaled look-up (learned positions with an offset, for example)
    is none, because the normal form does not describe it.
    """
    parameters = logical_shapes(module)
    weight = parameters.get("weight", ())
    scale = 1.0
    if isinstance(module, nn.Linear) and len(weight) == 2:
        kind, (num_out, num_in) = SiteKind.LINEAR, weight
    elif isinstance(module, Conv1D):
        kind, (num_in, num_out) = SiteKind.CONV1D, weight
    elif _is_lookup(module):
        kind, (num_in, num_out) = SiteKind.EMBEDDING, weight
        scale = _embed_scale(module)
    elif type(module).__name__.endswith("Norm") and len(weight) == 1 and not isinstance(module, nn.GroupNorm):
        kind, num_in, num_out = SiteKind.NORM, weight[0], weight[0]
    else:
        return expert_spec(path, module) or router_spec(path, module) or attention_spec(path, module)
    return SiteSpec(
        path=path, kind=kind, out_features=num_out, in_features=num_in, parameters=parameters, embed_scale=scale
    )


def _is_lookup(module: nn.Module) -> bool:
    is_scaled = type(module).__name__.endswith("ScaledWordEmbedding")
    return type(module) is nn.Embedding or (is_scaled and isinstance(module, nn.Embedding))


def _embed_scale(module: nn.Module) -> float:
    """The factor as the module applies it: a buffer is rounded to the weight's dtype first."""
    scale = getattr(module, "embed_scale", None)
    if isinstance(scale, Tensor):
        assert isinstance(module.weight, Tensor)
        return float(scale.to(module.weight.dtype))
    return 1.0 if scale is None else float(scale)
