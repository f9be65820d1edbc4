"""Kinds of random adapters whose cost W11 takes: one term at every site that takes it, virtual tokens in front of a
request, and methods in turn."""

from collections.abc import Callable

from loadtest.terms import TERMS, Dice, EditOf, make_adapter
from loadtest.work import is_head
from peft_serve.adapters.base import BaseShape, SiteKind, SiteSpec
from peft_serve.adapters.primitives import Adapter, Affine, Edit, KVPrefix, LowRank, SoftPrompt
from peft_serve.core import AdapterId
from peft_serve.model.base import ResidentBase

Make = Callable[[ResidentBase, int], Adapter | None]
"""The adapter of this kind in this slot, 1 or above; None: the slot's rows are the base's own."""

NUM_VIRTUAL = 20
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def _by(edit_of: EditOf) -> Make:
    return lambda base, slot: make_adapter(base, edit_of, slot)


def _soft_prompt(base: ResidentBase, slot: int) -> Adapter:
    dice = Dice(slot, base.dtype)
    prompt = SoftPrompt(dice.small(NUM_VIRTUAL, base.shape.hidden_size))
    return Adapter(id=AdapterId(f"sha256:{slot}"), method="TEST", prompt=prompt)


def _kv_prefix(base: ResidentBase, slot: int) -> Adapter:
    dice, shape = Dice(slot, base.dtype), base.shape
    keys, values = (dice.small(shape.num_layers, shape.num_kv_heads, NUM_VIRTUAL, shape.head_dim) for _ in range(2))
    return Adapter(id=AdapterId(f"sha256:{slot}"), method="TEST", prefix=KVPrefix(keys, values))


def _low_rank_attention(spec: SiteSpec, shape: BaseShape, dice: Dice) -> Edit | None:
    if spec.kind is not SiteKind.LINEAR or not spec.path.endswith(_ATTENTION) or is_head(spec, shape.vocab_size):
        return None
    return Affine(delta=LowRank(dice.small(8, spec.in_features), dice.small(spec.out_features, 8)))


def _scales(spec: SiteSpec, _: BaseShape, dice: Dice) -> Edit | None:
    """Where IA3 has them: on keys and values, and in front of the last product of a feed-forward."""
    if spec.kind is not SiteKind.LINEAR:
        return None
    if spec.path.endswith(("k_proj", "v_proj")):
        return Affine(out_scale=dice.gain(spec.out_features))
    return Affine(in_scale=dice.gain(spec.in_features)) if spec.path.endswith("down_proj") else None


def _mixed(base: ResidentBase, slot: int) -> Adapter | None:
    return _MIXTURE[(slot - 1) % len(_MIXTURE)](base, slot)


_MIXTURE: tuple[Make, ...] = (
    _by(_low_rank_attention),
    _by(TERMS["low rank 16"]),
    _by(_scales),
    _soft_prompt,
    _kv_prefix,
    lambda _base, _slot: None,
)

KINDS: dict[str, Make] = {
    **{name: _by(edit_of) for name, edit_of in TERMS.items()},
    f"soft prompt of {NUM_VIRTUAL}": _soft_prompt,
    f"KV prefix of {NUM_VIRTUAL}": _kv_prefix,
    "MIX": _mixed,
}
"""By the names that `--term` takes."""


def is_empty(adapter: Adapter) -> bool:
    """Whether the base has no place for it."""
    return not adapter.sites and adapter.prompt is None and adapter.prefix is None
