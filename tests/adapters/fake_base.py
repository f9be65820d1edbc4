"""A base over a plain transformers model, and the slow way to run a compiled adapter on a copy of it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from peft_serve.adapters.base import HAS_WEIGHT, BaseShape, SiteKind, SiteSpec
from peft_serve.adapters.primitives import (
    Adapter,
    Affine,
    BlockDiagonal,
    Dense,
    Edit,
    Experts,
    GatedPrompt,
    Kronecker,
    KVPrefix,
    LinearMap,
    Mixer,
    Replace,
    Rows,
    Sparse,
)
from peft_serve.adapters.shared_primitives import SharedBases
from peft_serve.adapters.transform_primitives import Circulant, Spectrum


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
        self.body_prefix = str(model.base_model_prefix)
        head = model.get_output_embeddings()
        self.beside_body = frozenset(p for p in self.sites if model.get_submodule(p) is head)

    @property
    def tied(self) -> tuple[frozenset[str], ...]:
        groups: dict[int, set[str]] = {}
        for path in (path for path, spec in self.sites.items() if spec.kind in HAS_WEIGHT):
            groups.setdefault(id(self.model.get_submodule(path).weight), set()).add(path)
        return tuple(frozenset(group) for group in groups.values() if len(group) > 1)

    def weight(self, path: str) -> Tensor:
        weight = self.model.get_submodule(path).weight.detach().float()
        return weight.T if self.sites[path].kind in (SiteKind.CONV1D, SiteKind.EMBEDDING) else weight

    def bias(self, path: str) -> Tensor | None:
        bias = getattr(self.model.get_submodule(path), "bias", None)
        return None if bias is None else bias.detach().float()

    def parameter(self, path: str, name: str) -> Tensor:
        return getattr(self.model.get_submodule(path), name).detach().float()

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
    elif any(len(shape) == 3 for shape in parameters.values()):
        kind, num_in, num_out = SiteKind.EXPERTS, 0, 0
    elif type(module).__name__.endswith("Router"):
        kind, (num_out, num_in) = SiteKind.ROUTER, parameters["weight"]
    elif hasattr(module, "layer_idx") and (hasattr(module, "q_proj") or hasattr(module, "c_attn")):
        kind, num_in, num_out = SiteKind.ATTENTION, module.config.hidden_size, module.config.hidden_size
    else:
        return None
    return SiteSpec(
        path=path,
        kind=kind,
        out_features=num_out,
        in_features=num_in,
        parameters=parameters,
        embed_scale=scale,
        is_transposed=bool(getattr(module, "is_transposed", False)),
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


def adapted(base: FakeBase, adapter: Adapter, *, first: int = 0) -> PreTrainedModel:
    """A copy of the model with the adapter's edits in place, for the tokens from `first` on."""
    model = copy.deepcopy(base.model)
    for path, edit in adapter.sites.items():
        module = model.get_submodule(path)
        plain = module.forward
        _apply(module, base.sites[path], edit)
        if first:
            module.forward = _from_token(first, plain, module.forward)
    return model


def _from_token(first: int, plain: Callable[..., Tensor], changed: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda x: torch.cat([plain(x)[:, :first], changed(x)[:, first:]], dim=1)


def _apply(module: Any, spec: SiteSpec, edit: Edit) -> None:
    if isinstance(edit, Experts):
        for name, factors in edit.factors.items():
            delta = factors.b_EOR @ factors.a_ERI
            getattr(module, name).data += delta.mT if spec.is_transposed else delta
        return
    if isinstance(edit, GatedPrompt):
        module.forward = _gated(module, edit)
        return
    if isinstance(edit, Replace):
        for name, tensor in edit.state.items():
            assert tuple(tensor.shape) == spec.parameters[name]
            setattr(module, name, nn.Parameter(tensor, requires_grad=False))
        assert edit.state.keys() == spec.parameters.keys()
        return
    assert isinstance(edit, Affine)
    if spec.kind is SiteKind.ROUTER:
        assert edit.delta is not None
        module.weight.data += edit.delta.b_OR @ edit.delta.a_RI
        return
    module.forward = _affine(module.forward, spec, edit)


def _affine(inner: Callable[[Tensor], Tensor], spec: SiteSpec, edit: Affine) -> Callable[[Tensor], Tensor]:
    """The normal form, word for word."""
    is_lookup = spec.kind is SiteKind.EMBEDDING

    def forward(x: Tensor) -> Tensor:
        z = x if edit.in_scale is None else edit.in_scale * x
        z = z if edit.in_mix is None else mixed(edit.in_mix, z)
        y = inner(z)
        if edit.rows is not None:
            y = with_rows(edit.rows, z, y, scale=spec.embed_scale, is_lookup=is_lookup)
        y = y if edit.out_scale is None else edit.out_scale * y
        y = y if edit.out_mix is None else mixed(edit.out_mix, y)
        if edit.delta is not None:
            a, b = edit.delta.a_RI, edit.delta.b_OR
            low = nn.functional.embedding(x, a.T) if is_lookup else x @ a.T
            y = y + low @ b.T
        for linear_map in edit.maps:
            weight = dense_of(linear_map, spec)
            y = y + (nn.functional.embedding(x, weight.T) if is_lookup else x @ weight.T)
        return y if edit.shift is None else y + edit.shift

    return forward


def _gated(module: Any, edit: GatedPrompt) -> Callable[..., Any]:
    """The attention's own output, and what its queries find in the prompt."""
    inner = module.forward

    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        output, *rest = inner(hidden_states, *args, **kwargs)
        q = _queries(module, hidden_states, kwargs.get("position_embeddings"))
        repeats = q.shape[1] // edit.keys_HPD.shape[0]
        keys, values = (side.repeat_interleave(repeats, dim=0) for side in (edit.keys_HPD, edit.values_HPD))
        scores = torch.softmax(q @ keys.mT / module.head_dim**0.5, dim=-1)
        added = (edit.gate * scores @ values).transpose(1, 2).flatten(2)
        if edit.is_projected:
            added = added @ module.o_proj.weight.T
        return (output + added, *rest)

    return forward


def _queries(module: Any, x: Tensor, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
    q = module.q_proj(x) if rotary is not None else module.c_attn(x).chunk(3, dim=-1)[0]
    q = q.unflatten(-1, (-1, module.head_dim)).transpose(1, 2)
    if rotary is None:
        return q
    cos, sin = (part.unsqueeze(1) for part in rotary)
    first, second = q.chunk(2, dim=-1)
    return q * cos + torch.cat([-second, first], dim=-1) * sin


def mixed(mixer: Mixer, x: Tensor) -> Tensor:
    if isinstance(mixer, BlockDiagonal):
        n, k, _ = mixer.blocks_NKK.shape
        parts = x.reshape(*x.shape[:-1], n, k)
        return torch.einsum("...nk,nkc->...nc", parts, mixer.blocks_NKK).reshape(x.shape)
    halves = x.reshape(*x.shape[:-1], -1, 2, mixer.group // 2)
    return mixer.own_O * x + mixer.other_O * halves.flip(-2).reshape(x.shape)


def dense_of(linear_map: LinearMap, spec: SiteSpec) -> Tensor:
    """The map as a matrix [o, i]."""
    if isinstance(linear_map, Dense):
        return linear_map.weight_OI
    if isinstance(linear_map, Kronecker):
        return torch.kron(linear_map.left.contiguous(), linear_map.right.contiguous())
    if isinstance(linear_map, Sparse):
        weight = torch.zeros(spec.out_features, spec.in_features)
        return weight.index_put((linear_map.out_N, linear_map.in_N), linear_map.values_N, accumulate=True)
    if isinstance(linear_map, Circulant):
        return circulant_matrix(linear_map.kernel_MNB)
    if isinstance(linear_map, Spectrum):
        spectrum = torch.zeros(spec.out_features, spec.in_features)
        spectrum = spectrum.index_put((linear_map.out_N, linear_map.in_N), linear_map.values_N, accumulate=True)
        return torch.fft.ifft2(spectrum).real
    if isinstance(linear_map, SharedBases):
        return bases_matrix(linear_map, spec)
    a, b = linear_map.a_RI[:, : spec.in_features], linear_map.b_OR[: spec.out_features]
    return linear_map.outer_O[:, None] * (b @ (linear_map.inner_R[:, None] * a))


def circulant_matrix(kernel_MNB: Tensor) -> Tensor:
    """Block by block, row by row: each row of a block is the one above moved on by one."""
    m, n, size = kernel_MNB.shape
    rows = torch.stack([kernel_MNB.roll(t, dims=2) for t in range(size)], dim=1)  # [m, t, n, s]
    return rows.reshape(m * size, n * size)


def bases_matrix(given: SharedBases, spec: SiteSpec) -> Tensor:
    """One low-rank map for each gain vector, as the paper has them; column p n + q of B belongs to rank p of map q."""
    small, large = sorted((spec.out_features, spec.in_features))
    n, size = given.gains_QS.shape
    assert size == small
    weight = torch.zeros(large, small, dtype=given.a_RS.dtype)
    for q, gains in enumerate(given.gains_QS):
        columns = given.b_LC[:large, q : given.weights_RQ.numel() : n]
        weight += (columns * given.weights_RQ[:, q]) @ (given.a_RS[:, :small] * gains)
    return weight.T if given.is_transposed else weight


def with_rows(rows: Rows, x: Tensor, y: Tensor, *, scale: float, is_lookup: bool) -> Tensor:
    y = y.clone()
    for at, values in zip(rows.ids_N.tolist(), rows.values_ND, strict=True):
        if is_lookup:
            y[x == at] = scale * values
        else:
            y[..., at] = x @ values
    return y


def cache_of(prefix: KVPrefix, *, is_encoder_decoder: bool) -> Any:
    cache = DynamicCache()
    for layer, (keys, values) in enumerate(zip(prefix.keys_LHPD, prefix.values_LHPD, strict=True)):
        cache.update(keys[None], values[None], layer)
    return EncoderDecoderCache(cache, DynamicCache()) if is_encoder_decoder else cache


def first_active(adapter: Adapter, ids: Tensor) -> int:
    """The token from which the adapter acts: the first one of the last occurrence of what switches it on."""
    tokens, start = ids[0].tolist(), list(adapter.start)
    places = [i for i in range(len(tokens)) if tokens[i : i + len(start)] == start]
    return places[-1] if start and places else len(tokens) if start else 0


@torch.no_grad()
def adapted_logits(base: FakeBase, adapter: Adapter, ids: Tensor, decoder_ids: Tensor) -> Tensor:
    """Logits of one sequence `ids` [1, T]; on an encoder-decoder, of `decoder_ids` given the source `ids`."""
    model = adapted(base, adapter, first=first_active(adapter, ids))
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
