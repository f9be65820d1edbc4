"""What encoder-decoder families share: an encode pass for new rows, and a decoder with a cross-attention
cache of its own.

The library's decoder computes cross-attention keys and values when its cache says they are missing, and reads
them from the cache when it says they are there. `PassThrough` stands in for that cache: it stores nothing (the
pools do), and says "missing" in a pass with new rows, "there" in one without.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from peft_serve.adapters.base import BaseShape
from peft_serve.model.attention import Kind, Place, RaggedAttention
from peft_serve.model.pools import KVShape
from peft_serve.model.ragged import RelativeBias
from peft_serve.model.routing import Stream


class PassThrough(DynamicCache):  # type: ignore[misc]
    """A cache that keeps nothing: what is put in comes out. Its `layers` hold dummies to be read."""

    def __init__(self, shape: KVShape, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        nothing = torch.zeros((1, shape.num_heads, 1, shape.head_dim), dtype=dtype, device=device)
        for _ in range(shape.num_layers):
            layer = DynamicLayer()
            layer.keys = layer.values = nothing
            self.layers.append(layer)

    def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        return key_states, value_states

    def get_seq_length(self, *_: object, **__: object) -> int:
        return 0


class EncoderDecoder:
    """A sequence-to-sequence model. T5 and BART say the rest."""

    cross_names: ClassVar[frozenset[str]]
    """The last names of the modules that are cross-attention."""
    unadaptable: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._config: Any = model.config
        self._encoder: nn.Module = model.get_encoder()
        self._decoder: nn.Module = model.get_decoder()
        self._head: nn.Module = model.get_output_embeddings()
        self._stacks = {m: path for path, m in model.named_modules() if m in (self._encoder, self._decoder)}
        self.shape = self._shape()
        self.cache = KVShape(
            num_layers=self.shape.num_layers, num_heads=self.shape.num_kv_heads, head_dim=self.shape.head_dim
        )
        self.cross_cache = self.cache
        self.attention = RaggedAttention(self._places())
        nothing = PassThrough(self.cross_cache, dtype=model.dtype, device=model.device)
        self._memory = EncoderDecoderCache(nothing, nothing)
        is_inner = hasattr(getattr(self._encoder, "embed_tokens", None), "embed_scale")
        self._outer_scale = 1.0 if is_inner else float(getattr(self._encoder, "embed_scale", 1.0))
        self._no_source = torch.zeros((1, 1, self.shape.hidden_size), dtype=model.dtype, device=model.device)

    @property
    def has_position_limit(self) -> bool:
        return True

    def _shape(self) -> BaseShape:
        raise TypeError(f"{type(self).__name__} does not say its shape")

    def _biases(self) -> dict[nn.Module, RelativeBias]:
        """The relative position bias of each attention module that has one."""
        return {}

    def _places(self) -> dict[nn.Module, Place]:
        """Every module with a query projection, by what it reads."""
        biases = self._biases()
        places: dict[nn.Module, Place] = {}
        for stack, kind in ((self._encoder, Kind.SOURCE), (self._decoder, Kind.SELF)):
            num_found = 0
            for path, module in stack.named_modules():
                if not (hasattr(module, "q_proj") or hasattr(module, "q")):
                    continue
                is_cross = path.rpartition(".")[2] in self.cross_names
                places[module] = Place(
                    kind=Kind.CROSS if is_cross else kind,
                    # An encoder keeps nothing, so that its modules may not know which layer they are of.
                    layer=num_found if kind is Kind.SOURCE else module.layer_idx,
                    bias=None if is_cross else biases.get(module),
                )
                num_found += 1
        return places

    def prepare(self) -> None:
        self.attention.install(self._model)

    def stream_of(self, path: str) -> Stream:
        if self._model.get_submodule(path) is self._head:
            return Stream.HEAD
        if path.startswith(self._stacks[self._encoder] + "."):
            return Stream.SOURCE
        names = path.split(".")
        reads_source = names[-1] in {"k", "v", "k_proj", "v_proj"} and names[-2] in self.cross_names
        return Stream.SOURCE if reads_source else Stream.TARGET

    def embed(self, tokens_S: Tensor) -> Tensor:
        embeddings: Tensor = self._encoder.embed_tokens(tokens_S[None])  # type: ignore[operator]
        return embeddings[0] * self._outer_scale

    def behind(self, prompt_PD: Tensor, embeddings_SD: Tensor) -> Tensor:
        """Embedded tokens behind a soft prompt, as peft gives them to the encoder.

        An encoder that scales outside its table (Marian) scales nothing it is given, neither prompt nor tokens.
        """
        return torch.cat((prompt_PD.to(embeddings_SD.dtype), embeddings_SD / self._outer_scale))

    def encode(self, embeddings_SD: Tensor, positions_S: Tensor) -> Tensor:
        self._set_positions(self._encoder, positions_S)
        encoded: Tensor = self._encoder(inputs_embeds=embeddings_SD[None]).last_hidden_state
        return encoded

    def hidden(self, tokens_T: Tensor, positions_T: Tensor, source: Tensor | None) -> None:
        self._decode(tokens_T, positions_T, source)

    def logits(self, tokens_T: Tensor, positions_T: Tensor, keep_N: Tensor, source: Tensor | None) -> Tensor:
        hidden_TD = self._decode(tokens_T, positions_T, source)[0]
        return self._project(hidden_TD[keep_N][None])[0]

    def _decode(self, tokens_T: Tensor, positions_T: Tensor, source: Tensor | None) -> Tensor:
        self._set_positions(self._decoder, positions_T)
        self._memory.is_updated = dict.fromkeys(range(self.shape.num_layers), source is None)
        hidden: Tensor = self._decoder(
            input_ids=tokens_T[None],
            encoder_hidden_states=self._no_source if source is None else source,
            past_key_values=self._memory,
            use_cache=True,
        ).last_hidden_state
        return hidden

    def _set_positions(self, stack: nn.Module, positions: Tensor) -> None:
        """Tell a stack where its tokens stand, if it cannot be told by its arguments."""

    def _project(self, hidden_1ND: Tensor) -> Tensor:
        """Logits [1, N, V] of decoder states."""
        logits: Tensor = self._head(hidden_1ND)
        return logits
