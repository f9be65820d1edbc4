"""A base over a plain transformers model, and the slow way to run a compiled adapter on a copy of it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from peft_serve.adapters.base import BaseShape, SiteKind, SiteSpec
from peft_serve.adapters.primitives import Adapter, Affine, Edit, KVPrefix, Replace


class FakeBase:
    """Implements `adapters.base.Base` by looking into the model each time it is asked."""

    def __init__(self, model: PreTrainedModel, *, name: str = "tiny", dtype: torch.dtype = torch.float32) -> None:
        self.model = model
        self.name = name
        self.dtype = dtype
        specs = ((path, site_spec(path, module)) for path, module in model.named_modules())
        self.sites: Mapping[str, SiteSpec] = {path: spec for path, spec in specs if spec is not None}
        self.class_name = type(model).__name__
        self.family = str(model.config.model_type)
        self.shape = base_shape(model)

    @property
    def tied(self) -> tuple[frozenset[str], ...]:
        groups: dict[int, set[str]] = {}
        for path in self.sites:
            groups.setdefault(id(self.model.get_submodule(path).weight), set()).add(path)
        return tuple(frozenset(group) for group in groups.values() if len(group) > 1)

    def weight(self, path: str) -> Tensor:
        weight = self.model.get_submodule(path).weight.detach().float()
        return weight.T if self.sites[path].kind in (SiteKind.CONV1D, SiteKind.EMBEDDING) else weight

    def bias(self, path: str) -> Tensor | None:
        bias = getattr(self.model.get_submodule(path), "bias", None)
        return None if bias is None else bias.detach().float()

    def fingerprint(self) -> tuple[float, ...]:
        return tuple(float(p.detach().double().abs().sum()) for p in self.model.parameters())


def site_spec(path: str, module: nn.Module) -> SiteSpec | None:
    parameters = {name: tuple(p.shape) for name, p in module.named_parameters(recurse=False)}
    scale = 1.0
    if isinstance(module, nn.Linear):
        kind, (num_out, num_in) = SiteKind.LINEAR, parameters["weight"]
    elif isinstance(module, Conv1D):
        kind, (num_in, num_out) = SiteKind.CONV1D, parameters["weight"]
    elif isinstance(module, nn.Embedding):
        kind, (num_in, num_out) = SiteKind.EMBEDDING, parameters["weight"]
        scale = float(getattr(module, "embed_scale", 1.0))
    elif "Norm" in type(module).__name__:
        kind, num_in, num_out = SiteKind.NORM, parameters["weight"][0], parameters["weight"][0]
    else:
        return None
    return SiteSpec(
        path=path, kind=kind, out_features=num_out, in_features=num_in, parameters=parameters, embed_scale=scale
    )


def base_shape(model: PreTrainedModel) -> BaseShape:
    config = model.config
    heads = getattr(config, "decoder_attention_heads", None) or config.num_attention_heads
    hidden = config.hidden_size
    layers = getattr(config, "num_decoder_layers", None) or getattr(config, "decoder_layers", None)
    return BaseShape(
        hidden_size=hidden,
        vocab_size=config.vocab_size,
        num_layers=layers or config.num_hidden_layers,
        num_heads=heads,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or getattr(config, "d_kv", None) or hidden // heads,
        max_positions=getattr(config, "max_position_embeddings", None) or 512,
        is_encoder_decoder=config.is_encoder_decoder,
    )


def adapted(base: FakeBase, adapter: Adapter) -> PreTrainedModel:
    """A copy of the model with the adapter's edits in place."""
    model = copy.deepcopy(base.model)
    for path, edit in adapter.sites.items():
        _apply(model.get_submodule(path), base.sites[path], edit)
    return model


def _apply(module: Any, spec: SiteSpec, edit: Edit) -> None:
    if isinstance(edit, Replace):
        for name, tensor in edit.state.items():
            assert tuple(tensor.shape) == spec.parameters[name]
            setattr(module, name, nn.Parameter(tensor, requires_grad=False))
        assert edit.state.keys() == spec.parameters.keys()
        return
    module.forward = _affine(module.forward, spec, edit)


def _affine(inner: Callable[[Tensor], Tensor], spec: SiteSpec, edit: Affine) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        y = inner(x if edit.in_scale is None else edit.in_scale * x)
        if edit.out_scale is not None:
            y = edit.out_scale * y
        if edit.delta is not None:
            a, b = edit.delta.a_RI, edit.delta.b_OR
            low = nn.functional.embedding(x, a.T) if spec.kind is SiteKind.EMBEDDING else x @ a.T
            y = y + low @ b.T
        return y if edit.shift is None else y + edit.shift

    return forward


def cache_of(prefix: KVPrefix, *, is_encoder_decoder: bool) -> Any:
    cache = DynamicCache()
    for layer, (keys, values) in enumerate(zip(prefix.keys_LHPD, prefix.values_LHPD, strict=True)):
        cache.update(keys[None], values[None], layer)
    return EncoderDecoderCache(cache, DynamicCache()) if is_encoder_decoder else cache


@torch.no_grad()
def adapted_logits(base: FakeBase, adapter: Adapter, ids: Tensor, decoder_ids: Tensor) -> Tensor:
    """Logits of one sequence `ids` [1, T]; on an encoder-decoder, of `decoder_ids` given the source `ids`."""
    model = adapted(base, adapter)
    seq2seq = base.shape.is_encoder_decoder
    given: dict[str, Any] = {"decoder_input_ids": decoder_ids} if seq2seq else {}
    if adapter.prefix is not None:
        given["past_key_values"] = cache_of(adapter.prefix, is_encoder_decoder=seq2seq)
        if not seq2seq:
            given["attention_mask"] = torch.ones(1, adapter.prefix.keys_LHPD.shape[2] + ids.shape[1])
    if adapter.prompt is None:
        return model(input_ids=ids, **given).logits
    embeds = torch.cat([adapter.prompt.embeddings_PD[None], model.get_input_embeddings()(ids)], dim=1)
    given["attention_mask"] = torch.ones(embeds.shape[:2])
    logits = model(inputs_embeds=embeds, **given).logits
    return logits if seq2seq else logits[:, adapter.prompt.embeddings_PD.shape[0] :]
