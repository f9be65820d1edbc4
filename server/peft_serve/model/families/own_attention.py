"""Decoder-only models whose attention modules compute their scores themselves: Bloom, Falcon, MPT, GPT-J, CodeGen,
GPT-Neo.

Transformers asks nobody for the attention of these. Their modules' own projections, rotations and output layers stay;
the part between them, or the whole `forward` where no method marks that part, is bound to our attention. Slopes by
head (ALiBi, arXiv:2108.12409) are taken from the model's own function.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.falcon.modeling_falcon import apply_rotary_pos_emb
from transformers.models.falcon.modeling_falcon import build_alibi_tensor as falcon_alibi

from peft_serve.model.attention import Kind, Place, RaggedAttention
from peft_serve.model.families.decoder_only import DecoderOnly
from peft_serve.model.ragged import SlopeBias

_TWO_KEYS: Final = 2  # enough to see a slope


def _inner(module: Any, attention: RaggedAttention) -> Callable[..., Any]:
    """`_attn` of GPT-J, CodeGen and GPT-Neo: attention over queries and keys that are ready."""
    scaling = 1.0 / float(getattr(module, "scale_attn", 1.0))  # GPT-Neo does not scale
    window = module.config.window_size if getattr(module, "attention_type", "global") == "local" else None

    def attend(query: Tensor, key: Tensor, value: Tensor, *_: object, **__: object) -> tuple[Tensor, None]:
        # Tables of rotations in float32 make queries and keys float32 in a model of half precision.
        ready = (query.to(value.dtype), key.to(value.dtype), value)
        return attention.attend(module, *ready, scaling=scaling, window=window).transpose(1, 2), None

    return attend


def _bloom(module: Any, attention: RaggedAttention) -> Callable[..., Any]:
    def forward(hidden_states: Tensor, residual: Tensor, *_: object, **__: object) -> tuple[Tensor, None]:
        query, key, value = module._reshape(module.query_key_value(hidden_states))
        attended = attention.attend(module, query, key, value, scaling=module.inv_norm_factor)
        return module.dense(attended.flatten(2)) + residual, None

    return forward


def _falcon(module: Any, attention: RaggedAttention) -> Callable[..., Any]:
    heads, kv_heads, size = module.num_heads, module.num_kv_heads, module.head_dim

    def split(qkv: Tensor) -> tuple[Tensor, ...]:
        """Keys and values by key/value head; the module itself would repeat them for every query head."""
        if not module.new_decoder_architecture:
            parts: tuple[Tensor, ...] = module._split_heads(qkv)
            return parts
        groups = qkv.view(*qkv.shape[:2], kv_heads, heads // kv_heads + 2, size)
        return groups[..., :-2, :].flatten(2, 3), groups[..., -2, :], groups[..., -1, :]

    def forward(
        hidden_states: Tensor,
        alibi: Tensor | None = None,
        *_: object,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **__: object,
    ) -> tuple[Tensor, None]:
        query, key, value = (x.transpose(1, 2) for x in split(module.query_key_value(hidden_states)))
        if alibi is None:
            assert position_embeddings is not None, "a Falcon without slopes rotates"
            query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        attended = attention.attend(module, query, key, value, scaling=module.inv_norm_factor)
        return module.dense(attended.flatten(2)), None

    return forward


def _mpt(module: Any, attention: RaggedAttention) -> Callable[..., Any]:
    def forward(hidden_states: Tensor, *_: object, **__: object) -> tuple[Tensor, None]:
        qkv = module.Wqkv(hidden_states)
        if module.clip_qkv:
            qkv = qkv.clamp(min=-module.clip_qkv, max=module.clip_qkv)
        parts = (x.unflatten(-1, (module.n_heads, module.head_dim)).transpose(1, 2) for x in qkv.chunk(3, dim=2))
        attended = attention.attend(module, *parts, scaling=module.softmax_scale)
        return module.out_proj(attended.flatten(2)), None

    return forward


_BINDINGS: Final[Mapping[str, tuple[str, str, Callable[[Any, RaggedAttention], Callable[..., Any]]]]] = (
    MappingProxyType(
        {  # model type: (class of the module, method to replace, what makes the replacement)
            "gptj": ("GPTJAttention", "_attn", _inner),
            "codegen": ("CodeGenAttention", "_attn", _inner),
            "gpt_neo": ("GPTNeoSelfAttention", "_attn", _inner),
            "bloom": ("BloomAttention", "forward", _bloom),
            "falcon": ("FalconAttention", "forward", _falcon),
            "mpt": ("MptAttention", "forward", _mpt),
        }
    )
)


class OwnAttention(DecoderOnly):
    """A causal language model of one of these kinds."""

    def _num_kv_heads(self) -> int:
        first: Any = self._modules()[0]
        return getattr(first, "num_kv_heads", None) or int(self._config.num_attention_heads)

    def _modules(self) -> list[nn.Module]:
        """The attention modules, first layer first."""
        name = _BINDINGS[self._config.model_type][0]
        return [module for module in self._model.modules() if type(module).__name__ == name]

    def _places(self) -> Mapping[nn.Module, Place]:
        bias = _slopes(self._model, self._config)
        return {m: Place(kind=Kind.SELF, layer=layer, bias=bias) for layer, m in enumerate(self._modules())}

    def _replace_attention(self) -> None:
        _, method, replacement = _BINDINGS[self._config.model_type]
        for module in self._modules():
            module.__dict__[method] = replacement(module, self.attention)
        if self._config.model_type != "mpt":  # which cannot do without the mask that nobody reads
            self._model.config._attn_implementation = self.attention.name


@torch.no_grad()
def _slopes(model: PreTrainedModel, config: Any) -> SlopeBias | None:
    """What the model adds to the score of a key for its position, if that is how it tells positions."""
    body: Any = model.base_model
    num_heads, device = config.num_attention_heads, model.device
    if config.model_type == "mpt":
        by_key_H2 = body.build_mpt_alibi_tensor(num_heads, _TWO_KEYS, device=device).view(num_heads, _TWO_KEYS)
        return SlopeBias(by_key_H2[:, 1] - by_key_H2[:, 0])
    keys = torch.ones(1, _TWO_KEYS, dtype=torch.long, device=device)
    if config.model_type == "bloom":
        return SlopeBias(body.build_alibi_tensor(keys, num_heads, dtype=torch.float32).view(num_heads, -1)[:, 1])
    if config.model_type == "falcon" and config.alibi:
        slopes_H = falcon_alibi(keys, num_heads, dtype=torch.bfloat16).view(num_heads, -1)[:, 1]
        return SlopeBias(slopes_H, divisor=float(config.hidden_size // num_heads) ** 0.5)
    return None
