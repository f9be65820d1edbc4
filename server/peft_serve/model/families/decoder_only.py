"""Decoder-only models: Llama, Qwen, Mistral, Gemma, GPT-2, OPT, GPT-NeoX and their like.

Their forward already takes positions and the indices of the logits to keep, so that nothing but the
attention is replaced. The model's own head does what is particular to it (soft-capped logits, scales).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from peft_serve.adapters.base import BaseShape
from peft_serve.model.attention import RaggedAttention
from peft_serve.model.pools import KVShape
from peft_serve.model.routing import Stream

_LEARNED_POSITIONS = frozenset({"gpt2", "opt", "gpt_neo", "gpt_bigcode", "xglm", "biogpt"})


class DecoderOnly:
    """A causal language model."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._config: Any = model.config.get_text_config(decoder=True)
        self._decoder: nn.Module = model.base_model
        head = model.get_output_embeddings()
        self._head_paths = frozenset(path for path, module in model.named_modules() if module is head)
        self.shape = self._shape()
        self.cache = KVShape(
            num_layers=self.shape.num_layers, num_heads=self.shape.num_kv_heads, head_dim=self.shape.head_dim
        )
        self.cross_cache = None
        # A rotary table that is made anew for long rows would change for the short rows beside them, so a
        # model that has one keeps to the lengths it was made for.
        self.has_position_limit = self._config.model_type in _LEARNED_POSITIONS or bool(_rope_types(self._config))
        self.attention = RaggedAttention({})
        self.unadaptable: frozenset[str] = frozenset()

    def _shape(self) -> BaseShape:
        config = self._config
        num_heads = config.num_attention_heads
        return BaseShape(
            hidden_size=self._model.get_input_embeddings().embedding_dim,
            vocab_size=config.vocab_size,
            num_layers=config.num_hidden_layers,
            num_heads=num_heads,
            num_kv_heads=getattr(config, "num_key_value_heads", None) or num_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // num_heads,
            max_positions=_max_positions(config),
            is_encoder_decoder=False,
        )

    def prepare(self) -> None:
        self.attention.install(self._model)

    def stream_of(self, path: str) -> Stream:
        return Stream.HEAD if path in self._head_paths else Stream.TARGET

    def hidden(self, tokens_T: Tensor, positions_T: Tensor, source: Tensor | None) -> None:
        assert source is None, "a decoder-only model reads no source"
        self._decoder(input_ids=tokens_T[None], position_ids=positions_T[None], use_cache=False)

    def logits(self, tokens_T: Tensor, positions_T: Tensor, keep_N: Tensor, source: Tensor | None) -> Tensor:
        assert source is None, "a decoder-only model reads no source"
        out = self._model(
            input_ids=tokens_T[None], position_ids=positions_T[None], use_cache=False, logits_to_keep=keep_N
        )
        logits: Tensor = out.logits[0]
        return logits

    def read_prompt(self, embeddings_PD: Tensor, positions_P: Tensor) -> None:
        self._decoder(inputs_embeds=embeddings_PD[None], position_ids=positions_P[None], use_cache=False)


def _rope_types(config: Any) -> set[str]:
    """The kinds of rotary embedding of this model that depend on the longest row of a batch."""
    given = getattr(config, "rope_parameters", None) or {}
    each = [given] if "rope_type" in given else [v for v in given.values() if isinstance(v, dict)]
    return {str(v.get("rope_type")) for v in each} & {"dynamic", "longrope"}


def _max_positions(config: Any) -> int:
    limit = int(config.max_position_embeddings)
    if "longrope" in _rope_types(config):
        given = config.rope_parameters.get("original_max_position_embeddings")
        limit = min(limit, int(given or getattr(config, "original_max_position_embeddings", limit)))
    return limit
