"""What the runner asks of a family of models, and nothing of how the family answers.

A family knows one kind of transformers model: which module sees which tokens, how its attention is replaced,
and how its parts are called with rows side by side. It holds no adapter, no block and no request.

Shapes: `T` decoder tokens of the step, `S` source tokens, `N` positions whose logits are asked for,
`V` vocabulary, `d` hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor

from peft_serve.adapters.base import BaseShape
from peft_serve.model.attention import RaggedAttention
from peft_serve.model.pools import KVShape
from peft_serve.model.routing import Stream


class Family(Protocol):
    """A model whose decoder runs over rows side by side."""

    @property
    def shape(self) -> BaseShape: ...

    @property
    def cache(self) -> KVShape:
        """The decoder's self-attention cache."""
        ...

    @property
    def cross_cache(self) -> KVShape | None:
        """The cross-attention cache; None on a decoder-only model."""
        ...

    @property
    def has_position_limit(self) -> bool:
        """Whether `shape.max_positions` is a limit of the model, not a habit of its training."""
        ...

    @property
    def attention(self) -> RaggedAttention:
        """The attention that the model uses once `prepare` has run."""
        ...

    @property
    def unadaptable(self) -> frozenset[str]:
        """Last names of modules whose table is read without a call, so that no adapter can act there."""
        ...

    def prepare(self) -> None:
        """Make the model run over rows side by side; once, before its first pass."""
        ...

    def stream_of(self, path: str) -> Stream:
        """Which tokens the module at this path sees."""
        ...

    def hidden(self, tokens_T: Tensor, positions_T: Tensor, source: Tensor | None) -> None:
        """Run the decoder for its keys and values, and its last hidden states, alone."""
        ...

    def logits(self, tokens_T: Tensor, positions_T: Tensor, keep_N: Tensor, source: Tensor | None) -> Tensor:
        """Run the decoder; next-token logits [N, V] after the tokens at `keep_N`.

        `source` are the encoded new rows [1, S, d], None if there are none.
        """
        ...


@runtime_checkable
class ReadsPrompts(Protocol):
    """A family whose soft prompts stand in front of the decoder's own tokens."""

    def read_prompt(self, embeddings_PD: Tensor, positions_P: Tensor) -> None:
        """Run the decoder over given embeddings, for their keys and values alone."""
        ...


@runtime_checkable
class ReadsSources(Protocol):
    """A family with an encoder."""

    def embed(self, tokens_S: Tensor) -> Tensor:
        """The encoder's embeddings [S, d] of token ids."""
        ...

    def behind(self, prompt_PD: Tensor, embeddings_SD: Tensor) -> Tensor:
        """The embeddings [P + S, d] of a source behind a soft prompt."""
        ...

    def encode(self, embeddings_SD: Tensor, positions_S: Tensor) -> Tensor:
        """Run the encoder over embeddings; gives [1, S, d]."""
        ...


@runtime_checkable
class ReadsStates(Protocol):
    """A family of decoders whose last hidden states can be read."""

    def states(self) -> Tensor:
        """The last hidden states [T, d] of the pass that ran last."""
        ...


@runtime_checkable
class ReadsRows(Protocol):
    """A family that is an encoder and nothing else: a row is read in one pass, in both directions."""

    @property
    def is_padded(self) -> bool:
        """Whether its rows are padded to one length, all of them with the same adapter."""
        ...

    @property
    def num_positions(self) -> int:
        """Relative positions that its layers project beside the tokens, in the stream of that name."""
        ...

    @property
    def has_segments(self) -> bool:
        """Whether tokens have types (BERT's first and second sentence)."""
        ...

    def embed(self, tokens_S: Tensor) -> Tensor:
        """The embeddings [S, d] of token ids, before positions and types."""
        ...

    def positions(self, tokens: Sequence[int], *, num_prefix: int, num_prompt: int) -> list[int]:
        """Where the soft prompt and the tokens of one row stand, behind a prefix of keys and values."""
        ...

    def read(
        self,
        embeddings_SD: Tensor,
        positions_S: Tensor,
        segments_S: Tensor,
        lengths: Sequence[int],
        bare_N: Tensor | None = None,
    ) -> Tensor:
        """The last hidden states [S, d] of rows side by side.

        The embeddings at places `bare_N` go into the first layer as they are: no position, no type and no norm.
        """
        ...


@runtime_checkable
class SharesModules(Protocol):
    """A family with modules that are called with the tokens of two streams in one pass."""

    def share(self, sharing: Callable[[str, Stream], Callable[[Stream], None]]) -> None:
        """`sharing` takes a module's path and its second stream, and gives what says whose tokens come next."""
        ...
