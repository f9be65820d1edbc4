"""Several compiled adapters as one: their terms united, site by site.

What is added beside the base's own output adds up (low-rank terms, other maps, shifts), times each part's weight; a
weighted sum of LoRAs is peft's `add_weighted_adapter(combination_type="cat")`. Scales of one site multiply. Soft
prompts and prefixes stand one behind the other in the order named. Whatever would depend on an order that nobody
gave, or would need two things in one place, is refused. Pure functions; knows no name, no store and no executor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from peft_serve.adapters.base import Base
from peft_serve.adapters.combined import is_combined, parts_of
from peft_serve.adapters.config_schema import Config
from peft_serve.adapters.gate import Inspected
from peft_serve.adapters.limits import GateLimits
from peft_serve.adapters.primitives import (
    Adapter,
    Affine,
    Dense,
    Edit,
    ExpertFactors,
    Experts,
    Kronecker,
    KVPrefix,
    LinearMap,
    LowRank,
    Replace,
    Rows,
    SoftPrompt,
    Sparse,
    is_finite,
)
from peft_serve.adapters.registry import TASK_FIELD
from peft_serve.adapters.shared_primitives import Rescaled, SharedBases
from peft_serve.adapters.transform_primitives import Circulant, Spectrum
from peft_serve.core import AdapterId
from peft_serve.errors import InvalidParameter

T = TypeVar("T")

LoadPart = Callable[[AdapterId, int | None], Adapter]
"""A checkpoint compiled, for one of its tasks if it holds several."""


def for_task(inspected: Inspected, task: int | None) -> Inspected:
    """A checkpoint that is to be compiled for one of its tasks."""
    if task is None:
        return inspected
    return replace(inspected, config=Config({**inspected.config.fields, TASK_FIELD: task}))


def load_combined(adapter: AdapterId, load_part: LoadPart, base: Base, limits: GateLimits) -> Adapter:
    """The adapter of an id that `combined.combined_id` made; raises InvalidParameter when the parts do not go together.

    Everything that `load_part` raises goes through.
    """
    if not is_combined(adapter):
        return load_part(adapter, None)
    parts = [(load_part(part.id, part.task), part.weight) for part in parts_of(adapter)]
    made = combine(parts, adapter)
    _check_budget(made, base, limits)
    return made


def combine(parts: Sequence[tuple[Adapter, float]], id: AdapterId) -> Adapter:
    """The parts, each with its weight, as one adapter; raises InvalidParameter with the reason why they cannot be."""
    adapters = [_weighted(adapter, weight) for adapter, weight in parts]
    if len(adapters) == 1:
        return replace(adapters[0], id=id)
    if any(adapter.start for adapter in adapters):
        raise _refusal("one of them starts at an invocation in the prompt (aLoRA), the others act on all of it")
    paths = dict.fromkeys(path for adapter in adapters for path in adapter.sites)
    return Adapter(
        id=id,
        method="+".join(adapter.method for adapter in adapters),
        sites={path: _joined(path, [a.sites[path] for a in adapters if path in a.sites]) for path in paths},
        prompt=_joined_prompt(adapters),
        prefix=_joined_prefix(adapters),
        source_prefix=_one_behind_the_other([a.source_prefix for a in adapters if a.source_prefix is not None]),
        cross_prefix=_one_behind_the_other([a.cross_prefix for a in adapters if a.cross_prefix is not None]),
        head=_only((a.head for a in adapters), "two of them bring a task head"),
    )


def _refusal(reason: str) -> InvalidParameter:
    return InvalidParameter(f"adapter: these cannot be combined: {reason}; name one of them", param="adapter")


def _only(values: Iterable[T | None], reason: str) -> T | None:
    """The one value that there is; raises InvalidParameter for several."""
    there = [value for value in values if value is not None]
    if len(there) > 1:
        raise _refusal(reason)
    return there[0] if there else None


# ---- weights


def _weighted(adapter: Adapter, weight: float) -> Adapter:
    if weight == 1.0:
        return adapter
    prefixes = [each for each in (adapter.prefix, adapter.source_prefix, adapter.cross_prefix) if each is not None]
    for what, has in (("a soft prompt", adapter.prompt), ("a prefix", prefixes), ("a task head", adapter.head)):
        if has:
            raise _no_weight(what)
    return replace(adapter, sites={path: _weighted_edit(path, edit, weight) for path, edit in adapter.sites.items()})


def _no_weight(what: str) -> InvalidParameter:
    return InvalidParameter(
        f"adapter: {what} has no weight, only what is added to a site's output has; leave the weight out",
        param="adapter",
    )


def _weighted_edit(path: str, edit: Edit, weight: float) -> Edit:
    if isinstance(edit, Experts):
        factors = {name: ExpertFactors(f.a_ERI, f.b_EOR * weight) for name, f in edit.factors.items()}
        return Experts(factors)
    if not isinstance(edit, Affine):
        raise _no_weight(f"what replaces or reads a whole module ({path})")
    if any(each is not None for each in (edit.rows, edit.in_scale, edit.in_mix, edit.out_scale, edit.out_mix)):
        raise _no_weight(f"what scales, rotates or exchanges ({path})")
    return replace(
        edit,
        delta=None if edit.delta is None else LowRank(edit.delta.a_RI, edit.delta.b_OR * weight),
        maps=tuple(_weighted_map(each, weight) for each in edit.maps),
        shift=None if edit.shift is None else edit.shift * weight,
    )


def _weighted_map(linear: LinearMap, weight: float) -> LinearMap:
    match linear:
        case Rescaled():
            return replace(linear, outer_O=linear.outer_O * weight)
        case SharedBases():
            return replace(linear, weights_RQ=linear.weights_RQ * weight)
        case Dense():
            return Dense(linear.weight_OI * weight)
        case Kronecker():
            return replace(linear, left=linear.left * weight)
        case Sparse() | Spectrum():
            return replace(linear, values_N=linear.values_N * weight)
        case Circulant():
            return Circulant(linear.kernel_MNB * weight)


# ---- sites


def _joined(path: str, edits: Sequence[Edit]) -> Edit:
    if len(edits) == 1:
        return edits[0]
    affine = [edit for edit in edits if isinstance(edit, Affine)]
    if len(affine) == len(edits):
        return _joined_affine(path, affine)
    experts = [edit for edit in edits if isinstance(edit, Experts)]
    if len(experts) == len(edits):
        return _joined_experts(experts)
    replacements = [edit for edit in edits if isinstance(edit, Replace)]
    if len(replacements) == len(edits):
        return _joined_replacements(path, replacements)
    raise _refusal(f"two of them act on {path}, and one of them replaces or reads it as a whole")


def _joined_affine(path: str, edits: Sequence[Affine]) -> Affine:
    deltas = [edit.delta for edit in edits if edit.delta is not None]
    shifts = [edit.shift for edit in edits if edit.shift is not None]
    in_edit, out_edit = _in_side(path, edits), _out_side(path, edits)
    return Affine(
        rows=_joined_rows(path, [edit.rows for edit in edits if edit.rows is not None]),
        in_scale=in_edit.in_scale,
        in_mix=in_edit.in_mix,
        out_scale=out_edit.out_scale,
        out_mix=out_edit.out_mix,
        delta=_joined_low_rank(deltas) if deltas else None,
        maps=tuple(linear for edit in edits for linear in edit.maps),
        shift=torch.stack(shifts).sum(0) if shifts else None,
    )


def _joined_low_rank(deltas: Sequence[LowRank]) -> LowRank:
    """[B1 B2] [A1; A2] = B1 A1 + B2 A2."""
    if len(deltas) == 1:
        return deltas[0]
    a_RI = torch.cat([delta.a_RI for delta in deltas])
    return LowRank(a_RI, torch.cat([delta.b_OR.t() for delta in deltas]).t())  # turned, as `layout` has it


def _in_side(path: str, edits: Sequence[Affine]) -> Affine:
    """What happens to a site's input: one part's scale and mixer, or the product of scales alone."""
    acting = [edit for edit in edits if edit.in_scale is not None or edit.in_mix is not None]
    if len(acting) < 2:
        return acting[0] if acting else Affine()
    if any(edit.in_mix is not None for edit in acting):
        raise _refusal(f"two of them change what goes into {path}, and one rotates it: the order would matter")
    return Affine(in_scale=_product(edit.in_scale for edit in acting))


def _out_side(path: str, edits: Sequence[Affine]) -> Affine:
    """What happens to the base's own output. A scale that belongs to its own low-rank term (DoRA) takes no other."""
    acting = [edit for edit in edits if edit.out_scale is not None or edit.out_mix is not None]
    if len(acting) < 2:
        return acting[0] if acting else Affine()
    if any(edit.out_mix is not None for edit in acting):
        raise _refusal(f"two of them change what comes out of {path}, and one rotates it: the order would matter")
    if any(edit.delta is not None or edit.maps or edit.shift is not None for edit in acting):
        raise _refusal(
            f"two of them scale what comes out of {path}, and the scale of one was made for its own weights (DoRA)"
        )
    return Affine(out_scale=_product(edit.out_scale for edit in acting))


def _product(scales: Iterable[Tensor | None]) -> Tensor:
    return torch.stack([scale for scale in scales if scale is not None]).prod(0)


def _joined_rows(path: str, rows: Sequence[Rows]) -> Rows | None:
    if len(rows) < 2:
        return rows[0] if rows else None
    ids_N = torch.cat([each.ids_N for each in rows])
    if len(set(ids_N.tolist())) < ids_N.numel():
        raise _refusal(f"two of them bring a row of their own for one token of {path}")
    return Rows(ids_N, torch.cat([each.values_ND for each in rows]))


def _joined_replacements(path: str, replacements: Sequence[Replace]) -> Replace:
    state: dict[str, Tensor] = {}
    for replacement in replacements:
        for name, tensor in replacement.state.items():
            if name in state and not torch.equal(state[name], tensor):
                raise _refusal(f"two of them bring a {name} of their own for {path}")
            state[name] = tensor
    return Replace(state)


def _joined_experts(edits: Sequence[Experts]) -> Experts:
    names = dict.fromkeys(name for edit in edits for name in edit.factors)
    return Experts({name: _joined_factors([e.factors for e in edits], name) for name in names})


def _joined_factors(factors: Sequence[Mapping[str, ExpertFactors]], name: str) -> ExpertFactors:
    there = [each[name] for each in factors if name in each]
    a_ERI = torch.cat([each.a_ERI for each in there], dim=1).contiguous()
    return ExpertFactors(a_ERI, torch.cat([each.b_EOR for each in there], dim=2).contiguous())


# ---- sequence level


def _joined_prompt(adapters: Sequence[Adapter]) -> SoftPrompt | None:
    prompts = [adapter.prompt for adapter in adapters if adapter.prompt is not None]
    if len({prompt.is_bare for prompt in prompts}) > 1:
        raise _refusal("a soft prompt without positions (AdapterHub) cannot stand beside one with positions (peft)")
    if not prompts:
        return None
    return replace(prompts[0], embeddings_PD=torch.cat([prompt.embeddings_PD for prompt in prompts]))


def _joined_prefix(adapters: Sequence[Adapter]) -> KVPrefix | None:
    """Prefixes one behind the other. A soft prompt, if there is one too, stands behind them all."""
    has_prompt = any(adapter.prompt is not None and not adapter.prompt.is_bare for adapter in adapters)
    prefixes = [adapter.prefix for adapter in adapters if adapter.prefix is not None]
    if has_prompt and not all(prefix.advances_positions for prefix in prefixes):
        raise _refusal("a prefix that takes no positions (AdapterHub) cannot stand beside a soft prompt")
    return _one_behind_the_other(prefixes)


def _one_behind_the_other(prefixes: Sequence[KVPrefix]) -> KVPrefix | None:
    if not prefixes:
        return None
    if len({prefix.advances_positions for prefix in prefixes}) > 1:
        raise _refusal("a prefix that takes no positions (AdapterHub) cannot stand beside one that does (peft)")
    if len({prefix.absent for prefix in prefixes}) > 1:
        raise _refusal("their prefixes leave out different layers")
    return replace(
        prefixes[0],
        keys_LHPD=torch.cat([prefix.keys_LHPD for prefix in prefixes], dim=2).contiguous(),
        values_LHPD=torch.cat([prefix.values_LHPD for prefix in prefixes], dim=2).contiguous(),
    )


def _check_budget(adapter: Adapter, base: Base, limits: GateLimits) -> None:
    """What a checkpoint is held to, a combination is too; raises InvalidParameter."""
    footprint = adapter.footprint(is_encoder_decoder=base.shape.is_encoder_decoder)
    num_virtual = footprint.num_prefix_tokens + footprint.num_source_tokens + footprint.num_cross_tokens
    for value, most, what in (
        (footprint.max_rank, limits.max_rank, "rank {} together (--max-rank {})"),
        (footprint.num_bytes, limits.max_adapter_bytes, "{} bytes together (--max-adapter-bytes {})"),
        (num_virtual, limits.max_virtual_tokens, "{} virtual tokens together (--max-virtual-tokens {})"),
    ):
        if value > most:
            raise _refusal("they have " + what.format(value, most))
    if not is_finite(adapter):
        raise _refusal(f"their weights make values that {base.dtype} cannot hold")
