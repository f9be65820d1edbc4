"""Work: the bytes and flops that a step takes at least, from the base's shape and its adapters' terms."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import log2

from torch import Tensor

from loadtest.bound import Work
from peft_serve.adapters.base import SiteKind, SiteSpec
from peft_serve.adapters.primitives import (
    Adapter,
    Affine,
    BlockDiagonal,
    Dense,
    Edit,
    GatedPrompt,
    Kronecker,
    LinearMap,
    Mixer,
    Sparse,
    tensors_of,
)
from peft_serve.adapters.shared_primitives import Rescaled, SharedBases, SharedMap
from peft_serve.adapters.sublayer_primitives import Bottleneck, Coupling, Intervention
from peft_serve.adapters.transform_primitives import Circulant, Spectrum
from peft_serve.model.base import ResidentBase


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """The rows of a step: so many, each with `num_tokens` to compute behind `context` that it has computed before."""

    num_rows: int
    context: int = 0
    num_tokens: int = 1

    @property
    def total_tokens(self) -> int:
        """Tokens of the whole step."""
        return self.num_rows * self.num_tokens

    @property
    def attended(self) -> int:
        """Positions that the tokens of one row attend to, summed over its tokens."""
        return self.num_tokens * self.context + self.num_tokens * (self.num_tokens + 1) // 2


def base_work(base: ResidentBase, load: Load) -> Work:
    """The base's own part: linear weights, as they are stored, and cached keys and values read once; the head runs on
    each row's last token only."""
    shape, itemsize = base.shape, base.dtype.itemsize
    linear = [spec for spec in base.sites.values() if spec.kind is SiteKind.LINEAR]
    runs = {spec.path: load.num_rows if is_head(spec, shape.vocab_size) else load.total_tokens for spec in linear}
    kv_bytes = 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * itemsize * load.num_rows * load.context
    attention = 4 * shape.num_layers * shape.num_heads * shape.head_dim * load.num_rows * load.attended
    return Work(
        num_bytes=sum(_weight_bytes(base, spec) for spec in linear) + kv_bytes,
        num_flops=sum(2 * s.out_features * s.in_features * runs[s.path] for s in linear) + attention,
    )


def _weight_bytes(base: ResidentBase, spec: SiteSpec) -> int:
    weight = base.model.get_submodule(spec.path).weight
    assert isinstance(weight, Tensor)
    return weight.numel() * weight.element_size()


def is_head(spec: SiteSpec, vocab_size: int) -> bool:
    """Whether this is the layer that gives the logits."""
    return spec.kind is SiteKind.LINEAR and spec.out_features == vocab_size


def adapters_work(base: ResidentBase, adapters: Mapping[int, Adapter], load: Load, *, among: int | None = None) -> Work:
    """What adapters add: their terms, or the keys and values in front of their requests, read once each, and applied
    to the tokens, which `among` so many share evenly (default: the adapters)."""
    if not adapters:
        return Work(num_bytes=0, num_flops=0)
    shape, each = base.shape, load.total_tokens / (among or len(adapters))
    flops = (flops_of(edit, base.sites[path]) for adapter in adapters.values() for path, edit in adapter.sites.items())
    front = shape.num_layers * sum(num_virtual(adapter) for adapter in adapters.values())
    kv_bytes = 2 * shape.num_kv_heads * shape.head_dim * base.dtype.itemsize * front
    attended = 4 * shape.num_heads * shape.head_dim * front
    return Work(num_bytes=bytes_of(adapters) + kv_bytes, num_flops=each * (sum(flops) + attended))


def num_virtual(adapter: Adapter) -> int:
    """Positions in front of the tokens of its requests, on a decoder."""
    prompt = 0 if adapter.prompt is None else len(adapter.prompt.embeddings_PD)
    return prompt + (0 if adapter.prefix is None else adapter.prefix.keys_LHPD.shape[2])


def bytes_of(adapters: Mapping[int, Adapter]) -> int:
    """What adapters take; factors of one key once."""
    by_place: dict[object, int] = {}
    for adapter in adapters.values():
        for edit in adapter.sites.values():
            maps = edit.maps if isinstance(edit, Affine) else ()
            shared = {id(t): one.key for one in maps if isinstance(one, SharedMap) for t in one.factors}
            for tensor in tensors_of(edit):
                place = (shared[id(tensor)], tensor.shape) if id(tensor) in shared else id(tensor)
                by_place[place] = tensor.numel() * tensor.element_size()
    return sum(by_place.values())


def flops_of(edit: Edit, spec: SiteSpec) -> float:
    """Flops of one token through an edit; what replaces a part of the base adds none."""
    match edit:
        case Affine():
            delta = 0 if edit.delta is None else 2 * edit.delta.rank * (spec.in_features + spec.out_features)
            scales = (edit.in_scale, edit.out_scale, edit.shift)
            mixers = (edit.in_mix, edit.out_mix)
            return (
                delta
                + sum(0 if scale is None else scale.numel() for scale in scales)
                + sum(0 if mixer is None else _mixing(mixer) for mixer in mixers)
                + sum(_mapping(one, spec) for one in edit.maps)
            )
        case GatedPrompt():
            num_prompt = edit.keys_HPD.shape[1]
            return 4 * num_prompt * spec.in_features  # scores and sums of every query head
        case Bottleneck():
            return 4 * edit.down_BD.numel()
        case Coupling():
            return 2 * sum(net.first_BI.numel() + net.second_OB.numel() for net in (edit.left, edit.right))
        case Intervention():
            num_factors = 3 if edit.subtracts else 2  # W, P and P transposed; a token is edited by one unit at most
            return 2 * num_factors * edit.first.source_RD.numel()
        case _:
            return 0


def _mixing(mixer: Mixer) -> int:
    return 2 * mixer.blocks_NKK.numel() if isinstance(mixer, BlockDiagonal) else 4 * mixer.own_O.numel()


def _mapping(one: LinearMap, spec: SiteSpec) -> float:
    match one:
        case Dense():
            return 2 * one.weight_OI.numel()
        case Sparse():
            return 2 * one.values_N.numel()
        case Rescaled():
            return 2 * one.inner_R.numel() * (spec.in_features + spec.out_features)
        case SharedBases():
            return 2 * (one.gains_QS.shape[0] * one.a_RS.numel() + one.b_LC.numel())
        case Kronecker():
            (m, n), (p, q) = one.left.shape, one.right.shape
            return 2 * min(n * q * p + m * n * p, m * n * q + m * q * p)
        case Circulant():
            m, n, b = one.kernel_MNB.shape
            return (m + n) * _fourier(b) + 4 * one.kernel_MNB.numel()
        case Spectrum():
            return _fourier(spec.in_features) + _fourier(spec.out_features) + 8 * one.values_N.numel()


def _fourier(size: int) -> float:
    """Flops of a transform of so many real numbers, as is usually counted."""
    return 2.5 * size * log2(size)
