"""The resident base model.

Owns the transformers model and everything that is wrapped around it: its family, its attention and its
adapted sites. Its weights never change: `fingerprint` proves it. It knows no request, no block and no file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from peft_serve.adapters.base import HAS_WEIGHT, WITHOUT_MODULE, BaseShape, NoValues, SiteKind, SiteSpec
from peft_serve.adapters.heads import own_facts
from peft_serve.model.families.family import Family, SharesModules
from peft_serve.model.families.registry import family_of
from peft_serve.model.packed_weight import pieces
from peft_serve.model.quantised import dense, stored_tensors
from peft_serve.model.routing import Stream
from peft_serve.model.sites import AdaptedSites


class ResidentBase:
    """A frozen model, ready to run rows side by side. Implements `adapters.base.Base`."""

    def __init__(self, model: PreTrainedModel, *, name: str) -> None:
        model.requires_grad_(False)
        model.eval()
        self.name = name
        self.model = model
        self.dtype: torch.dtype = model.dtype  # asked by every step; the model walks its parameters to tell
        self.device: torch.device = model.device
        self.runs: Family = family_of(model)
        self.runs.prepare()
        self.adapted = AdaptedSites(model, stream_of=self.runs.stream_of)
        self.runs.attention.watched = self.adapted.beside_attention
        if isinstance(self.runs, SharesModules):
            self.runs.share(self.adapted.share)
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
    def sites(self) -> Mapping[str, SiteSpec]:
        return self._specs

    @property
    def tied(self) -> tuple[frozenset[str], ...]:
        by_weight: dict[int, set[str]] = {}
        for path, spec in self._specs.items():
            if spec.kind not in HAS_WEIGHT:
                continue
            weight = self.model.get_submodule(path).weight
            if isinstance(weight, Tensor):
                by_weight.setdefault(id(weight), set()).add(path)
        return tuple(frozenset(paths) for paths in by_weight.values() if len(paths) > 1)

    @property
    def body_prefix(self) -> str:
        return str(self.model.base_model_prefix)

    @cached_property
    def beside_body(self) -> frozenset[str]:  # the gate asks for it at every site
        modules = (path for path, spec in self._specs.items() if spec.kind not in WITHOUT_MODULE)
        return frozenset(path for path in modules if self.runs.stream_of(path) is Stream.HEAD)

    @property
    def labels(self) -> tuple[str, ...]:
        """What the outputs of the base's own task head are called, if it has one."""
        facts = own_facts(self)
        names = getattr(self.model.config, "id2label", None) or {}
        return () if facts is None else tuple(str(names.get(i, f"LABEL_{i}")) for i in range(facts.num_labels))

    @property
    def eos_ids(self) -> frozenset[int]:
        """The token ids that end a sequence, from the generation configuration, else the model's."""
        given = self._generation("eos_token_id")
        if given is None:
            return frozenset()
        return frozenset(given) if isinstance(given, list | tuple) else frozenset({int(given)})

    @property
    def pad_id(self) -> int | None:
        """The id that fills up short rows, if there is one; sequence heads of decoders leave it out."""
        given = getattr(self.model.config.get_text_config(), "pad_token_id", None)
        return None if given is None else int(given)

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

    @property
    def banned_ids(self) -> tuple[int, ...]:
        """Ids that no answer may hold: `suppress_tokens`, and `bad_words_ids` of one id (Marian's padding)."""
        words = [word[0] for word in self._generation("bad_words_ids") or () if len(word) == 1]
        ids = {int(i) for i in (*words, *(self._generation("suppress_tokens") or ()))}
        return tuple(sorted(i for i in ids - self.eos_ids if 0 <= i < self.shape.vocab_size))

    def _forced(self, key: str) -> int | None:
        given = self._generation(key)
        given = given[0] if isinstance(given, list | tuple) else given
        return None if given is None else int(given)

    def _generation(self, key: str) -> Any:
        given = getattr(getattr(self.model, "generation_config", None), key, None)  # a reader has none
        return getattr(self.model.config, key, None) if given is None else given

    def weight(self, path: str) -> Tensor:
        kind = self._specs[path].kind
        weight = self.parameter(path, "weight")
        return weight.T if kind in (SiteKind.CONV1D, SiteKind.EMBEDDING) else weight

    def parameter(self, path: str, name: str) -> Tensor:
        if self.device.type == "meta":
            raise NoValues(f"{self.name} was read without its weights, so that nobody knows {path}.{name}")
        return dense(self.model.get_submodule(path), name)

    def bias(self, path: str) -> Tensor | None:
        if not self._specs[path].has_bias:
            return None
        return self.parameter(path, "bias")

    def fingerprint(self) -> str:
        """A digest of every weight and buffer, by name, quantised ones as they are stored.

        Reads all of them: not for the serving path.
        """
        digest = hashlib.sha256()
        for name, tensor in sorted(stored_tensors(self.model), key=lambda item: item[0]):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            for piece in pieces(tensor):
                digest.update(piece.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        return f"sha256:{digest.hexdigest()}"
