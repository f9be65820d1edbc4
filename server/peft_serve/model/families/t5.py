"""T5 and its relatives: positions are a bias on the scores, learned by distance.

The model computes that bias for a batch of rows that all start together. Here it is taken once, at load, as a
table by distance from the model's own function, and added row by row by the attention.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from peft_serve.adapters.base import BaseShape
from peft_serve.model.families.encoder_decoder import EncoderDecoder
from peft_serve.model.ragged import RelativeBias


class T5(EncoderDecoder):
    """T5, mT5 and UMT5."""

    cross_names: ClassVar[frozenset[str]] = frozenset({"EncDecAttention"})
    unadaptable: ClassVar[frozenset[str]] = frozenset({"relative_attention_bias"})

    @property
    def has_position_limit(self) -> bool:
        return False

    def _shape(self) -> BaseShape:
        config = self._config
        return BaseShape(
            hidden_size=config.d_model,
            vocab_size=config.vocab_size,
            num_layers=config.num_decoder_layers,
            num_heads=config.num_heads,
            num_kv_heads=config.num_heads,
            head_dim=config.d_kv,
            max_positions=getattr(config, "n_positions", None) or 512,
            is_encoder_decoder=True,
        )

    @torch.no_grad()
    def _biases(self) -> dict[nn.Module, RelativeBias]:
        """By module: its own table, or that of the first layer of its stack, which T5 shares."""
        far = self._config.relative_attention_max_distance
        biases: dict[nn.Module, RelativeBias] = {}
        for stack in (self._encoder, self._decoder):
            shared: RelativeBias | None = None
            for path, module in stack.named_modules():
                if path.rpartition(".")[2] != "SelfAttention":
                    continue
                if getattr(module, "has_relative_attention_bias", False):
                    by_distance = module.compute_bias(2 * far + 1, 2 * far + 1)[0, :, far]
                    shared = RelativeBias(by_distance.contiguous(), far)
                assert shared is not None, f"{path} has no relative position bias to share"
                biases[module] = shared
        return biases

    def prepare(self) -> None:
        super().prepare()
        nothing = torch.zeros((1, 1, 1, 1), dtype=self._model.dtype, device=self._model.device)
        for module in self._model.modules():
            if getattr(module, "has_relative_attention_bias", False):
                module.compute_bias = lambda *_, **__: nothing

    def _project(self, hidden_1ND: Tensor) -> Tensor:
        if self._scales_output:
            hidden_1ND = hidden_1ND * (self._config.d_model**-0.5)
        return super()._project(hidden_1ND)

    @property
    def _scales_output(self) -> bool:
        """Whether the model scales decoder states before its head; each relative decides in its own way."""
        config = self._config
        by_type = {"mt5": False, "umt5": config.tie_word_embeddings}
        return bool(by_type.get(config.model_type, getattr(config, "scale_decoder_outputs", False)))
