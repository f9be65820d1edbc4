"""Decoder-only models: Llama, Qwen, Mistral, Gemma, GPT-2, OPT, GPT-NeoX and their like.

Their forward already takes positions and the indices of the logits to keep, so that nothing but the
attention is replaced. The model's own head does what is particular to it (soft-capped logits, scales).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from torch import Tensor, nn
from transformers import PreTrainedModel

from peft_serve.adapters.base import BaseShape
from peft_serve.model.attention import Place, RaggedAttention
from peft_serve.model.pools import KVShape
from peft_serve.model.routing import Stream

_TABLES = frozenset({"gpt2", "opt", "gpt_neo", "gpt_bigcode", "xglm", "biogpt", "gptj", "codegen", "mpt"})
"""Models that keep what they know of positions in a table and can go no further."""

_LENGTHS: Final = ("max_position_embeddings", "max_seq_len", "seq_length")
_USUAL_LENGTH: Final = 2048  # of a model without such a table whose configuration names no length


class DecoderOnly:
    """A causal language model."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._config: Any = model.config.get_text_config(decoder=True)
        self._decoder: nn.Module = model.base_model
        head = model.get_output_embeddings()
        self._head_paths = frozenset(path for path, module in model.named_modules() if module is head)
        paths = {module: path for path, module in model.named_modules()}
        self._inside = f"{paths[self._decoder]}." if paths[self._decoder] else ""
        self._states: Tensor | None = None  # of the pass that ran last
        self.shape = replace(self._shape(), generates=head is not None)
        self.cache = KVShape(
            num_layers=self.shape.num_layers, num_heads=self.shape.num_kv_heads, head_dim=self.shape.head_dim
        )
        self.cross_cache = None
        # A rotary table that is made anew for long rows would change for the short rows beside them, so a
        # model that has one keeps to the lengths it was made for.
        self.has_position_limit = self._config.model_type in _TABLES or bool(_rope_types(self._config))
        self.attention = RaggedAttention(self._places())
        self.unadaptable: frozenset[str] = frozenset()

    def _shape(self) -> BaseShape:
        config = self._config
        num_heads = config.num_attention_heads
        return BaseShape(
            hidden_size=self._model.get_input_embeddings().embedding_dim,
            vocab_size=config.vocab_size,
            num_layers=config.num_hidden_layers,
            num_heads=num_heads,
            num_kv_heads=self._num_kv_heads(),
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // num_heads,
            max_positions=_max_positions(config),
            is_encoder_decoder=False,
        )

    def _places(self) -> Mapping[nn.Module, Place]:
        """Attention modules that are more than a self-attention at their `layer_idx`."""
        return {}

    def _num_kv_heads(self) -> int:
        return getattr(self._config, "num_key_value_heads", None) or int(self._config.num_attention_heads)

    def _replace_attention(self) -> None:
        self.attention.install(self._model)

    def prepare(self) -> None:
        self._replace_attention()
        for module in self._model.modules():
            if isinstance(module, PreTrainedModel):  # rows are not padded, and looking for it waits for a GPU
                module.__dict__["warn_if_padding_and_no_attention_mask"] = _say_nothing
        self._stack().register_forward_hook(self._keep_states)

    def _stack(self) -> nn.Module:
        """The innermost module that gives last hidden states: some heads (OPT's) call it past the body around it."""
        inner = self._model.get_decoder()
        return inner if isinstance(inner, nn.Module) else self._decoder

    def _keep_states(self, _module: nn.Module, _args: object, out: Any) -> None:
        self._states = out.last_hidden_state[0]

    def states(self) -> Tensor:
        """The last hidden states [T, d] of the pass that ran last; they are given away."""
        states, self._states = self._states, None
        assert states is not None, "no pass has run since the states were read"
        return states

    def stream_of(self, path: str) -> Stream:
        return Stream.HEAD if path in self._head_paths or not path.startswith(self._inside) else Stream.TARGET

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


def _say_nothing(*_: object, **__: object) -> None:
    """The library's word on padding."""


def _rope_types(config: Any) -> set[str]:
    """The kinds of rotary embedding of this model that depend on the longest row of a batch."""
    given = getattr(config, "rope_parameters", None) or {}
    each = [given] if "rope_type" in given else [v for v in given.values() if isinstance(v, dict)]
    return {str(v.get("rope_type")) for v in each} & {"dynamic", "longrope"}


def _max_positions(config: Any) -> int:
    limit = next((int(n) for name in _LENGTHS if (n := getattr(config, name, None)) is not None), _USUAL_LENGTH)
    if "longrope" in _rope_types(config):
        given = config.rope_parameters.get("original_max_position_embeddings")
        limit = min(limit, int(given or getattr(config, "original_max_position_embeddings", limit)))
    return limit
