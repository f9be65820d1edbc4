"""BART and its relatives: positions are added inside the model, from a table.

The model counts positions from the length of its cache, the same for all rows. The position module is
replaced by one that reads the positions of the step.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding
from transformers import PreTrainedModel

from peft_serve.adapters.base import BaseShape
from peft_serve.model.families.encoder_decoder import EncoderDecoder

_TABLE = "embed_positions"


class StepPositions(nn.Module):
    """A table of position embeddings, read at positions that are set before the pass."""

    def __init__(self, table_PD: Tensor, offset: int) -> None:
        super().__init__()
        if isinstance(table_PD, nn.Parameter):
            self.weight = table_PD  # under the name it has in the model
        else:
            self.register_buffer("weights", table_PD, persistent=False)
        self._table_PD = table_PD
        self._offset = offset
        self.positions = torch.zeros(0, dtype=torch.long)

    def forward(self, *_: object, **__: object) -> Tensor:
        """Embeddings [1, T, d], whatever the model thinks the positions are."""
        return embedding(self.positions + self._offset, self._table_PD)[None]


def _step_positions(stack: nn.Module) -> StepPositions:
    """Of the table of a stack: learned (BART), or computed once and kept (Marian, Pegasus, M2M100)."""
    table: Any = getattr(stack, _TABLE, None)
    if isinstance(table, nn.Embedding):
        return StepPositions(table.weight, int(getattr(table, "offset", 0)))
    if isinstance(getattr(table, "weights", None), Tensor) and hasattr(table, "padding_idx"):
        return StepPositions(table.weights, int(table.padding_idx) + 1)  # places are counted behind the padding's
    raise TypeError(f"{type(stack).__name__} keeps its positions in no table called {_TABLE!r}")


class Bart(EncoderDecoder):
    """BART, mBART, Marian, Pegasus, M2M100 and models built like them."""

    cross_names: ClassVar[frozenset[str]] = frozenset({"encoder_attn"})
    unadaptable: ClassVar[frozenset[str]] = frozenset({_TABLE})

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        self._positions: dict[nn.Module, StepPositions] = {}
        for stack in (self._encoder, self._decoder):
            self._positions[stack] = _step_positions(stack)

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
        bias: Tensor | None = getattr(self._model, "final_logits_bias", None)
        logits = super()._project(hidden_1ND)
        return logits if bias is None else logits + bias
