"""From a checkpoint that passed the gate to primitives, in float32, rounded once to the base's compute type.

Knows what a saved parameter, a tuned bias and a method's edit at one site amount to together; the methods
themselves are in `methods/`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from peft_serve.adapters.base import Base, SiteKind
from peft_serve.adapters.bound import BoundSite
from peft_serve.adapters.gate import Inspected
from peft_serve.adapters.header import StoredTensor
from peft_serve.adapters.heads import BoundHead
from peft_serve.adapters.layout import laid_out
from peft_serve.adapters.limits import GateLimits
from peft_serve.adapters.primitives import (
    Adapter,
    Affine,
    Edit,
    Head,
    KVPrefix,
    Prefixes,
    Replace,
    SoftPrompt,
    is_finite,
)
from peft_serve.adapters.records import WEIGHTS_FILE
from peft_serve.adapters.registry import Sequence, SequenceMethod, Site, SiteMethod, Whole
from peft_serve.adapters.spending import Spending
from peft_serve.adapters.token_rows import spread
from peft_serve.errors import AdapterInvalid, Refusal

TRANSPOSED = frozenset({SiteKind.CONV1D, SiteKind.EMBEDDING})


def compile_adapter(inspected: Inspected, base: Base, limits: GateLimits) -> Adapter:
    """Compile for the base that `inspect` checked it against.

    Raises `AdapterInvalid` when the compiled adapter is not finite in the base's type or beyond its budget.
    """
    method = inspected.method
    shared = _load(inspected.binding.shared)
    prepared = _prepare(inspected, shared, base)
    edits: dict[str, Edit] = {}
    spending = Spending(base.dtype, limits.max_adapter_bytes)
    for path, bound in inspected.binding.sites.items():
        edit = _compile_site(inspected, bound, shared, prepared, base)
        if edit is not None:
            edits[path] = edit
            spending.add(edit)
    edits = spread(edits, base)
    front, prefixes = None, Prefixes()
    if isinstance(method, SiteMethod) and method.prefixes is not None:
        prefixes = method.prefixes(shared)
    if isinstance(method, SequenceMethod):
        sequence = Sequence(config=inspected.config, tensors=shared, base=base.shape)
        front = method.compile(sequence)
    adapter = Adapter(
        id=inspected.id,
        method=method.peft_type,
        sites=edits,
        prompt=front if isinstance(front, SoftPrompt) else prefixes.prompt,
        prefix=front if isinstance(front, KVPrefix) else prefixes.own,
        source_prefix=prefixes.source,
        cross_prefix=prefixes.cross,
        head=_head(inspected.binding.head),
        start=method.start(inspected.config) if isinstance(method, SiteMethod) else (),
    )
    adapter = laid_out(adapter, base.dtype)
    _check_budget(adapter, base, limits)
    return adapter


def _head(bound: BoundHead | None) -> Head | None:
    return None if bound is None else Head(bound.task, _load(bound.tensors))


def _load(stored: Mapping[str, StoredTensor]) -> dict[str, Tensor]:
    return {name: tensor.load() for name, tensor in stored.items()}


def _prepare(inspected: Inspected, shared: Mapping[str, Tensor], base: Base) -> Any:
    """What the sites of the method have in common, if it makes such a thing."""
    method, binding = inspected.method, inspected.binding
    if not isinstance(method, SiteMethod) or method.prepare is None:
        return None
    return method.prepare(Whole(config=inspected.config, shared=shared, targets=binding.targets, base=base))


def _compile_site(
    inspected: Inspected, bound: BoundSite, shared: Mapping[str, Tensor], prepared: Any, base: Base
) -> Edit | None:
    edit: Edit | None = None
    if bound.is_target and isinstance(inspected.method, SiteMethod):
        site = Site(
            spec=bound.spec,
            config=inspected.config,
            tensors=_load(bound.method),
            shared=shared,
            base=base,
            targets=inspected.binding.targets,
            prepared=prepared,
        )
        edit = inspected.method.compile(site)
    if bound.is_retrained:
        return Replace(_load(bound.saved))
    if "bias" in bound.saved:
        edit = _with_bias(edit, bound, base)
    if "weight" in bound.copies:
        edit = _on_own_weight(edit, bound, base)
    return edit


def _with_bias(edit: Edit | None, bound: BoundSite, base: Base) -> Edit | None:
    """A tuned bias b' instead of b: at a dense site the shift b' - b, which an affine edit takes up as it is."""
    bias, path = bound.saved["bias"].load(), bound.spec.path
    if isinstance(edit, Replace):
        return Replace({**edit.state, "bias": bias})
    assert edit is None or isinstance(edit, Affine), "only a dense site or a norm has a bias"
    if bound.spec.kind is SiteKind.NORM:
        return Replace({"weight": base.weight(path).cpu(), "bias": bias})
    own = _bias_of(base, path)
    assert own is not None, "the gate binds a bias only where the base has one"
    shift = bias - own
    if not bool(shift.any()):
        return edit
    if edit is None:
        return Affine(shift=shift)
    return replace(edit, shift=shift if edit.shift is None else edit.shift + shift)


def _on_own_weight(edit: Edit | None, bound: BoundSite, base: Base) -> Replace:
    """A low-rank term that was trained on another weight W' of the same shape: W' + B A replaces the site's own."""
    assert isinstance(edit, Affine), "the gate keeps a weight only beside a method's edit"
    assert edit.delta is not None, "and that edit is a low-rank term"
    delta = edit.delta.b_OR @ edit.delta.a_RI / bound.spec.embed_scale
    weight = bound.copies["weight"].load() + (delta.T if bound.spec.kind in TRANSPOSED else delta)
    bias = _bias_of(base, bound.spec.path)
    state = {"weight": weight}
    if bias is not None:
        state["bias"] = bias if edit.shift is None else bias + edit.shift
    return Replace(state)


def _bias_of(base: Base, path: str) -> Tensor | None:
    bias = base.bias(path)
    return None if bias is None else bias.cpu()


def _check_budget(adapter: Adapter, base: Base, limits: GateLimits) -> None:
    shape = base.shape
    footprint = adapter.footprint(is_encoder_decoder=shape.is_encoder_decoder, is_encoder=shape.is_encoder)
    refusals = []
    if not is_finite(adapter):
        refusals.append(
            Refusal(WEIGHTS_FILE, f"is not finite after compilation to {base.dtype}; retrain with smaller values")
        )
    if footprint.max_rank > limits.max_rank:
        refusals.append(
            Refusal(
                WEIGHTS_FILE,
                f"compiles to rank {footprint.max_rank}; this server was started with --max-rank {limits.max_rank}",
            )
        )
    if footprint.num_bytes > limits.max_adapter_bytes:
        refusals.append(
            Refusal(
                WEIGHTS_FILE,
                f"takes {footprint.num_bytes} bytes when compiled; this server takes {limits.max_adapter_bytes} "
                "(the smaller of --max-adapter-bytes and --device-adapter-bytes)",
            )
        )
    if refusals:
        raise AdapterInvalid(refusals)
