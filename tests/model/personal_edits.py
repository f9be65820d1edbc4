"""Adapters with parts that are computed for them alone, of every kind, on the tiny model of `test_step_graphs`."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from peft_serve.adapters.base import SiteSpec
from peft_serve.adapters.primitives import (
    Adapter,
    Affine,
    BlockDiagonal,
    Dense,
    Edit,
    GatedPrompt,
    Kronecker,
    Replace,
    Rows,
    Sparse,
)
from peft_serve.adapters.shared_primitives import SharedBases
from peft_serve.adapters.sublayer_primitives import Bottleneck, Coupling, Intervention, Reads, SubspaceEdit, TwoLayers
from peft_serve.adapters.transform_primitives import Circulant, Spectrum
from peft_serve.core import AdapterId
from tests.model.test_step_graphs import DOWN, EMBEDDING, HEAD, Bench, Q

ENTRY, OUTPUT = "model.invertible_adapters", "model.layers.0.output_adapters"
Draw = Callable[..., Tensor]


def sparse(spec: SiteSpec, drawn: Draw) -> Sparse:
    """A third of all entries, some of them twice, and none in some rows."""
    num = spec.out_features * spec.in_features // 3
    ids = drawn(2, num).abs()
    out_N = (ids[0] * 1000).long() % (spec.out_features - 1)
    return Sparse(out_N, (ids[1] * 1000).long() % (spec.in_features - 1), drawn(num))


def spectrum(spec: SiteSpec, drawn: Draw) -> Spectrum:
    entries = sparse(spec, drawn)
    return Spectrum(entries.out_N, entries.in_N, 300 * entries.values_N)


def bases(spec: SiteSpec, drawn: Draw) -> SharedBases:
    """One key for all adapters, of two ranks and three gains."""
    small, large = sorted((spec.in_features, spec.out_features))
    key = torch.Generator().manual_seed(5)
    a_RS, b_LC = torch.randn(2, 48, generator=key), torch.randn(64, 6, generator=key)
    is_transposed = spec.out_features == small and small != large
    return SharedBases("key", a_RS, b_LC, drawn(2, 3), drawn(3, small), is_transposed)


def two_layers(drawn: Draw) -> TwoLayers:
    return TwoLayers(drawn(5, 16), drawn(5), drawn(16, 5), drawn(16))


def parted(drawn: Draw) -> Bottleneck:
    """Of an activation that no kernel of ours knows."""
    return Bottleneck(
        down_BD=drawn(6, 32),
        down_bias_B=drawn(6),
        up_DB=drawn(32, 6),
        up_bias_D=drawn(32),
        activation="gelu_pytorch_tanh",
        scale=torch.tensor([1.5]),
        reads=Reads.RESIDUAL,
    )


def mapped(make: Callable[[SiteSpec, Draw], object]) -> Callable[[SiteSpec, Draw], Edit]:
    return lambda spec, drawn: Affine(maps=(make(spec, drawn),))  # type: ignore[arg-type]


def rows(spec: SiteSpec, drawn: Draw) -> Edit:
    """Of ids that are among the tokens that are asked and given, and more."""
    width = spec.out_features if spec.path == EMBEDDING else spec.in_features
    return Affine(rows=Rows(torch.arange(90, 6, -2), drawn(42, width)))


def own(spec: SiteSpec, drawn: Draw) -> Edit:
    return Replace({name: 3 * drawn(*shape) for name, shape in spec.parameters.items()})


def kronecker(spec: SiteSpec, drawn: Draw) -> Kronecker:
    num_out = 2 if spec.out_features % 2 == 0 else 1
    num_in = 4 if spec.in_features % 4 == 0 else 1
    return Kronecker(drawn(num_out, num_in), drawn(spec.out_features // num_out, spec.in_features // num_in))


Make = Callable[[SiteSpec, Draw], Edit]
KINDS: Mapping[str, Mapping[str, Make]] = {
    "dense": dict.fromkeys((Q, DOWN, EMBEDDING), mapped(lambda s, d: Dense(d(s.out_features, s.in_features)))),
    "kronecker": dict.fromkeys((Q, DOWN, EMBEDDING), mapped(kronecker)),
    "sparse": dict.fromkeys((Q, DOWN), mapped(sparse)),
    "sparse lookup": {EMBEDDING: mapped(sparse)},
    "circulant": dict.fromkeys(
        (Q, DOWN), mapped(lambda s, d: Circulant(d(s.out_features // 8, s.in_features // 8, 8)))
    ),
    "spectrum": dict.fromkeys((Q, DOWN), mapped(spectrum)),
    "bases": dict.fromkeys((Q, DOWN), mapped(bases)),
    "rows of the embedding": {EMBEDDING: rows},
    "rows of the head": {HEAD: rows, Q: mapped(kronecker)},
    "own layers": dict.fromkeys((Q, HEAD), own),
    "own embedding": {EMBEDDING: own},
    "coupling": {ENTRY: lambda _, d: Coupling(two_layers(d), two_layers(d), "tanh")},
    "bottleneck": {OUTPUT: lambda _, d: parted(d)},
}


def prompt(drawn: Draw) -> GatedPrompt:
    """For the two heads of keys that the tiny model has."""
    return GatedPrompt(drawn(2, 5, 8), drawn(2, 5, 8), torch.tensor([0.7]), is_projected=True)


STACKED: Mapping[str, Mapping[str, Make]] = {
    "mixers": {
        Q: lambda s, d: Affine(in_mix=BlockDiagonal(d(s.in_features // 4, 4, 4))),
        DOWN: lambda s, d: Affine(out_mix=BlockDiagonal(d(s.out_features // 8, 8, 8))),
    },
    "bottleneck": KINDS["bottleneck"],
    "gated prompt": {"model.layers.0.self_attn": lambda _, d: prompt(d)},
}
"""What has a kernel of its own, as a rule."""


def personal(bench: Bench, name: str, kind: str) -> Adapter:
    """An adapter of one kind; the name decides its numbers."""
    return made_of(bench, name, KINDS[kind])


def made_of(bench: Bench, name: str, kinds: Mapping[str, Make]) -> Adapter:
    """By site, what makes its edit there."""
    make = torch.Generator().manual_seed(sum(map(ord, name)))

    def drawn(*size: int) -> Tensor:
        return torch.randn(size, generator=make) * 0.4

    sites = {path: edit(bench.base.sites[path], drawn) for path, edit in kinds.items()}
    return Adapter(id=AdapterId(name), method="TEST", sites=sites)


def intervening(bench: Bench, name: str, places: tuple[int, int]) -> Adapter:
    """On so many first and last positions, what leaves the layer."""
    make = torch.Generator().manual_seed(sum(map(ord, name)))

    def unit() -> SubspaceEdit:
        drawn = [torch.randn(size, generator=make) * 0.5 for size in ((3, 32), (3,), (3, 32))]
        return SubspaceEdit(*drawn)

    edit = Intervention(
        first=unit(), last=unit(), num_first=places[0], num_last=places[1], activation="relu", subtracts=True
    )
    return Adapter(id=AdapterId(name), method="TEST", sites={"model.layers.0.reft_layer": edit})
