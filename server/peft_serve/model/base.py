"""The resident base model.

Owns the transformers model and everything that is wrapped around it: its family, its attention and its
adapted sites. Its weights never change: `fingerprint` proves it. It knows no request, no block and no file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from peft_serve.adapters.base import BaseShape, SiteKind, SiteSpec
from peft_serve.model.families.family import Family
from peft_serve.model.families.registry import family_of
from peft_serve.model.sites import AdaptedSites


class ResidentBase:
    """A frozen model, ready to run rows side by side. Implements `adapters.base.Base`."""

    def __init__(self, model: PreTrainedModel, *, name: str) -> None:
        model.requires_grad_(False)
        model.eval()
        self.name = name
        self.model = model
        self.runs: Family = family_of(model)
        self.runs.prepare()
        self.adapted = AdaptedSites(model, stream_of=self.runs.stream_of)
        self._specs = {
            path: spec
            for path, spec in self.adapted.specs.items()
            if path.rpartition(".")[2] not in self.runs.unadaptable
        }

    @property
    def class_name(self) -> str:
        return type(self.model).__name__

    @property
    def family(self) -> str:
        return str(self.model.config.model_type)

    @property
    def shape(self) -> BaseShape:
        return self.runs.shape

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.model.dtype
        return dtype

    @property
    def device(self) -> torch.device:
        device: torch.device = self.model.device
        return device

    @property
    def sites(self) -> Mapping[str, SiteSpec]:
        return self._specs

    @property
    def tied(self) -> tuple[frozenset[str], ...]:
        by_weight: dict[int, set[str]] = {}
        for path in self._specs:
            weight = self.model.get_submodule(path).weight
            if isinstance(weight, Tensor):
                by_weight.setdefault(id(weight), set()).add(path)
        return tuple(frozenset(paths) for paths in by_weight.values() if len(paths) > 1)

    @property
    def eos_ids(self) -> frozenset[int]:
        """The token ids that end a sequence, from the generation configuration, else the model's."""
        given = self._generation("eos_token_id")
        if given is None:
            return frozenset()
        return frozenset(given) if isinstance(given, list | tuple) else frozenset({int(given)})

    @property
    def decoder_start_ids(self) -> tuple[int, ...]:
        """What an encoder-decoder's decoder starts with."""
        if not self.shape.is_encoder_decoder:
            return ()
        start = self._generation("decoder_start_token_id")
        start = self._generation("bos_token_id") if start is None else start
        if start is None:
            raise ValueError(
                f"{self.name} names no decoder_start_token_id, so its decoder cannot start; "
                "add one to its generation_config.json"
            )
        return (int(start),)

    @property
    def forced_first(self) -> int | None:
        """The id an answer has to begin with (BART's `forced_bos_token_id`)."""
        return self._forced("forced_bos_token_id")

    @property
    def forced_last(self) -> int | None:
        """The id that ends an answer of full length (BART's `forced_eos_token_id`)."""
        return self._forced("forced_eos_token_id")

    def _forced(self, key: str) -> int | None:
        given = self._generation(key)
        given = given[0] if isinstance(given, list | tuple) else given
        return None if given is None else int(given)

    def _generation(self, key: str) -> Any:
        given = getattr(self.model.generation_config, key, None)
        return getattr(self.model.config, key, None) if given is None else given

    def weight(self, path: str) -> Tensor:
        kind = self._specs[path].kind
        weight: Tensor = _parameter(self.model.get_submodule(path), "weight").detach().float()
        return weight.T if kind in (SiteKind.CONV1D, SiteKind.EMBEDDING) else weight

    def parameter(self, path: str, name: str) -> Tensor:
        return _parameter(self.model.get_submodule(path), name).detach().float()

    def bias(self, path: str) -> Tensor | None:
        if not self._specs[path].has_bias:
            return None
        return _parameter(self.model.get_submodule(path), "bias").detach().float()

    def fingerprint(self) -> str:
        """A digest of every weight and buffer, by name. Reads all of them: not for the serving path."""
        digest = hashlib.sha256()
        state = [*self.model.named_parameters(), *self.model.named_buffers()]
        for name, tensor in sorted(state, key=lambda item: item[0]):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(memoryview(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()))
        return f"sha256:{digest.hexdigest()}"


def _parameter(module: nn.Module, name: str) -> Tensor:
    tensor = getattr(module, name)
    assert isinstance(tensor, Tensor), f"{type(module).__name__} has no tensor {name!r}"
    return tensor
