"""BART and its relatives: positions are added inside the model, from a table.

The model counts positions from the length of its cache, the same for all rows. The position module is
replaced by one that reads the positions of the step.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding
from transformers import PreTrainedModel

from peft_serve.adapters.base import BaseShape
from peft_serve.model.families.encoder_decoder import EncoderDecoder

_TABLE = "embed_positions"


class StepPositions(nn.Module):
    """A table of position embeddings, read at positions that are set before the pass."""

    def __init__(self, table: nn.Embedding) -> None:
        super().__init__()
        self.weight = table.weight
        self._offset = int(getattr(table, "offset", 0))
        self.positions = torch.zeros(0, dtype=torch.long)

    def forward(self, *_: object, **__: object) -> Tensor:
        """Embeddings [1, T, d], whatever the model thinks the positions are."""
        return embedding(self.positions + self._offset, self.weight)[None]


class Bart(EncoderDecoder):
    """BART, mBART and models built like them."""

    cross_names: ClassVar[frozenset[str]] = frozenset({"encoder_attn"})
    unadaptable: ClassVar[frozenset[str]] = frozenset({_TABLE})

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        self._positions: dict[nn.Module, StepPositions] = {}
        for stack in (self._encoder, self._decoder):
            table = getattr(stack, _TABLE, None)
            if not isinstance(table, nn.Embedding):
                raise TypeError(f"{type(stack).__name__} keeps its positions in no table called {_TABLE!r}")
            self._positions[stack] = StepPositions(table)

    def _shape(self) -> BaseShape:
        config = self._config
        num_heads = config.decoder_attention_heads
        return BaseShape(
            hidden_size=config.d_model,
            vocab_size=config.vocab_size,
            num_layers=config.decoder_layers,
            num_heads=num_heads,
            num_kv_heads=num_heads,
            head_dim=config.d_model // num_heads,
            max_positions=config.max_position_embeddings,
            is_encoder_decoder=True,
        )

    def prepare(self) -> None:
        super().prepare()
        for stack, positions in self._positions.items():
            setattr(stack, _TABLE, positions)

    def _set_positions(self, stack: nn.Module, positions: Tensor) -> None:
        self._positions[stack].positions = positions

    def _project(self, hidden_1ND: Tensor) -> Tensor:
        bias: Tensor = self._model.final_logits_bias
        return super()._project(hidden_1ND) + bias
