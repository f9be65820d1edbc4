"""Encoders: BERT, RoBERTa, XLM-R, CamemBERT, DistilBERT, ELECTRA and their like.

The body of the unmodified model reads rows side by side: its attention is ours, positions and token types are
given row by row. What stands behind the body, a pooler or a task head, is run by `model.heads` on the states it
asks for.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import PreTrainedModel

from peft_serve.adapters.base import BaseShape
from peft_serve.model.attention import Kind, Place, RaggedAttention
from peft_serve.model.pools import KVShape
from peft_serve.model.routing import Stream

_QUERIES = ("query", "q_lin", "q_proj", "Wqkv")


class Encoder:
    """A model that reads a text in both directions and generates none."""

    is_padded: ClassVar[bool] = False
    num_positions: int = 0
    unadaptable: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._config: Any = model.config
        self._body: Any = model.base_model
        paths = {module: path for path, module in model.named_modules()}
        self._inside = f"{paths[self._body]}." if paths[self._body] else ""
        self._takes = frozenset(inspect.signature(self._body.forward).parameters)
        table = getattr(getattr(self._body, "embeddings", None), "position_embeddings", None)
        # RoBERTa's kind counts positions from behind the id of its padding, whose own position is that id.
        self._padding: int | None = getattr(table, "padding_idx", None)
        self.shape = self._shape()
        self.cache = KVShape(num_layers=0, num_heads=self.shape.num_heads, head_dim=self.shape.head_dim)
        self.cross_cache = None
        self.attention = RaggedAttention(self._places())

    @property
    def has_position_limit(self) -> bool:
        return True

    @property
    def has_segments(self) -> bool:
        return "token_type_ids" in self._takes and getattr(self._config, "type_vocab_size", 0) > 1

    def _shape(self) -> BaseShape:
        config = self._config
        num_heads = config.num_attention_heads
        offset = 0 if self._padding is None else self._padding + 1
        return BaseShape(
            hidden_size=self._model.get_input_embeddings().embedding_dim,
            vocab_size=config.vocab_size,
            num_layers=config.num_hidden_layers if "past_key_values" in self._takes else 0,  # that take a prefix
            num_heads=num_heads,
            num_kv_heads=num_heads,
            head_dim=config.hidden_size // num_heads,
            max_positions=config.max_position_embeddings - offset,
            is_encoder_decoder=False,
            is_encoder=True,
            generates=False,
            num_states=config.hidden_size,
        )

    def _places(self) -> dict[nn.Module, Place]:
        """Every module with a query projection, in the order of the layers."""
        found = [m for m in self._body.modules() if any(hasattr(m, name) for name in _QUERIES)]
        return {module: Place(kind=Kind.SOURCE, layer=layer) for layer, module in enumerate(found)}

    def prepare(self) -> None:
        self.attention.install(self._model)
        pooler = getattr(self._body, "pooler", None)
        if isinstance(pooler, nn.Module):
            # The body would pool the first token of the whole line; the pooler is run by whoever wants its rows.
            pooler.__dict__["forward"] = lambda hidden_1SD: hidden_1SD[:, 0]

    def stream_of(self, path: str) -> Stream:
        is_body = path.startswith(self._inside) and not path.startswith(f"{self._inside}pooler.")
        return Stream.SOURCE if is_body else Stream.HEAD

    def embed(self, tokens_S: Tensor) -> Tensor:
        embeddings: Tensor = self._model.get_input_embeddings()(tokens_S[None])
        return embeddings[0]

    def positions(self, tokens: Sequence[int], *, num_prefix: int, num_prompt: int) -> list[int]:
        """As the library counts them, from ids, or one after the other where a soft prompt stands in front."""
        length = num_prompt + len(tokens)
        if self._padding is None:
            return list(range(num_prefix, num_prefix + length))
        if num_prompt:
            return list(range(self._padding + 1, self._padding + 1 + length))
        places, last = [], self._padding + num_prefix
        for token in tokens:
            last += token != self._padding
            places.append(self._padding if token == self._padding else last)
        return places

    def read(
        self,
        embeddings_SD: Tensor,
        positions_S: Tensor,
        segments_S: Tensor,
        lengths: Sequence[int],
        bare_N: Tensor | None = None,
    ) -> Tensor:
        assert sum(lengths) == len(embeddings_SD), "rows make up the line"
        given = {"position_ids": positions_S[None], "token_type_ids": segments_S[None]}
        more = {name: ids for name, ids in given.items() if name in self._takes}
        with self._kept_bare(embeddings_SD, bare_N):
            states: Tensor = self._body(inputs_embeds=embeddings_SD[None], **more).last_hidden_state
        return states[0]

    @contextmanager
    def _kept_bare(self, embeddings_SD: Tensor, bare_N: Tensor | None) -> Iterator[None]:
        """What the module of the embeddings gives, inside the block, is at these places what it was given."""
        if bare_N is None:
            yield
            return

        def put_back(_: nn.Module, __: object, embedded_1SD: Tensor) -> Tensor:
            return embedded_1SD.index_copy(1, bare_N, embeddings_SD[None, bare_N].to(embedded_1SD.dtype))

        hook = self._body.embeddings.register_forward_hook(put_back)
        try:
            yield
        finally:
            hook.remove()

    def hidden(self, *_: object, **__: object) -> None:
        raise AssertionError("an encoder has no decoder to run")

    def logits(self, *_: object, **__: object) -> Tensor:
        raise AssertionError("an encoder has no next tokens")
