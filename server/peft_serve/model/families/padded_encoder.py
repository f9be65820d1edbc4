"""DeBERTa: an encoder whose attention is its own and takes no plan, so that its rows are padded to one length.

Each layer projects the embeddings of relative positions beside its tokens, with the very modules that adapters
change; what one adapter makes of them is another one's error. So a pass holds rows of one adapter alone, and those
modules change between two streams: the tokens' and the positions'.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from peft_serve.adapters.base import BaseShape
from peft_serve.model.attention import Place
from peft_serve.model.families.encoder import Encoder
from peft_serve.model.routing import Stream

_SHARED = ("query_proj", "key_proj")  # of tokens, and of positions where the model shares them
_POSITIONS_ONLY = ("pos_key_proj", "pos_query_proj")


class PaddedEncoder(Encoder):
    """DeBERTa-v2 and v3."""

    is_padded: ClassVar[bool] = True
    unadaptable: ClassVar[frozenset[str]] = frozenset({"rel_embeddings"})

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        spans = getattr(self._body.encoder, "rel_embeddings", None)
        self.num_positions = 0 if spans is None else int(spans.weight.shape[0])

    def _shape(self) -> BaseShape:
        # No layer takes keys and values from elsewhere, so that a prefix of them finds no place.
        return replace(super()._shape(), num_layers=0)

    def _places(self) -> dict[nn.Module, Place]:
        return {}

    def prepare(self) -> None:
        """Nothing is replaced: padding and a mask are all the model needs."""

    def stream_of(self, path: str) -> Stream:
        is_norm = path == f"{self._inside}encoder.LayerNorm"
        if is_norm or path.rpartition(".")[2] in _POSITIONS_ONLY:
            return Stream.POSITIONS
        return super().stream_of(path)

    def share(self, sharing: Callable[[str, Stream], Callable[[Stream], None]]) -> None:
        """Have the shared projections follow the stream of what they are called with."""
        for path, module in self._model.named_modules():
            if path.rpartition(".")[2] in _SHARED and self.num_positions:
                module.register_forward_pre_hook(self._chooser(sharing(path, Stream.POSITIONS)))

    def _chooser(self, follow: Callable[[Stream], None]) -> Callable[[nn.Module, Any], None]:
        def choose(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            is_positions = args[0].shape[:-1] == (1, self.num_positions)
            follow(Stream.POSITIONS if is_positions else Stream.SOURCE)

        return choose

    def read(
        self,
        embeddings_SD: Tensor,
        positions_S: Tensor,
        segments_S: Tensor,
        lengths: Sequence[int],
        bare_N: Tensor | None = None,
    ) -> Tensor:
        """Rows of one adapter."""
        assert bare_N is None, "no adapter that the gate lets in has such a prompt here"
        embeddings = pad_sequence(list(torch.split(embeddings_SD, list(lengths))), batch_first=True)
        places = torch.arange(embeddings.shape[1], device=embeddings.device)
        mask_RM = places[None] < torch.tensor(list(lengths), device=embeddings.device)[:, None]
        states_RMD: Tensor = self._body(
            inputs_embeds=embeddings,
            attention_mask=mask_RM.long(),
            token_type_ids=pad_sequence(list(torch.split(segments_S, list(lengths))), batch_first=True),
            position_ids=pad_sequence(list(torch.split(positions_S, list(lengths))), batch_first=True),
        ).last_hidden_state
        return states_RMD[mask_RM]
