"""A base of seventy billion parameters, in shapes alone: whoever reads one of its weights has gone too far."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from peft_serve.adapters.base import BaseShape, SiteKind, SiteSpec

HIDDEN, INNER, KEYS, VOCAB, LAYERS = 8192, 28672, 1024, 128_256, 80
PROJECTIONS = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KEYS, HIDDEN),
    "self_attn.v_proj": (KEYS, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}


def _linear(path: str, num_out: int, num_in: int) -> SiteSpec:
    shape = {"weight": (num_out, num_in)}
    return SiteSpec(path=path, kind=SiteKind.LINEAR, out_features=num_out, in_features=num_in, parameters=shape)


class GiantBase:
    """Implements `adapters.base.Base`."""

    name = "giant"
    class_name = "LlamaForCausalLM"
    family = "llama"
    body_prefix = "model"
    beside_body = frozenset({"lm_head"})
    dtype = torch.bfloat16
    tied: tuple[frozenset[str], ...] = ()
    shape = BaseShape(
        hidden_size=HIDDEN,
        vocab_size=VOCAB,
        num_layers=LAYERS,
        num_heads=64,
        num_kv_heads=8,
        head_dim=128,
        max_positions=8192,
        is_encoder_decoder=False,
    )

    def __init__(self) -> None:
        paths = {f"model.layers.{n}.{name}": sides for n in range(LAYERS) for name, sides in PROJECTIONS.items()}
        paths["lm_head"] = (VOCAB, HIDDEN)
        self.sites: Mapping[str, SiteSpec] = {path: _linear(path, *sides) for path, sides in paths.items()}

    def weight(self, path: str) -> Tensor:
        raise AssertionError(f"{path}.weight was read")

    def parameter(self, path: str, name: str) -> Tensor:
        raise AssertionError(f"{path}.{name} was read")

    def bias(self, path: str) -> Tensor | None:
        assert path in self.sites
        return None
