"""Where AdapterHub's `adapters` acts in each kind of model, and by what names its checkpoints know these places.

This is all that is known about architectures: for each kind of layer the linear layers that LoRA may sit in, and
the residual sublayers with the modules around their addition. A sublayer's site has the path that AdapterHub gives
its own module, which need not exist in the transformers model.

Read from `adapters` 1.3.0: `models/*/mixin_*.py`, `models/*/modeling_*.py`. Knows no tensors and no checkpoint.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import Final

from peft_serve.adapters.base import Base, SiteKind

INVERTIBLE: Final = "invertible_adapters"
"""Under which the coupling of the embeddings is saved, below the body or its encoder."""
AFTER_LAYER: Final = "reft_layer"
"""Under which a layer's intervention is saved."""


class Role(StrEnum):
    """What a place is to its layer. Sublayers and feed-forward layers are called as the config's flag is."""

    AFTER_ATTENTION = "mh_adapter"
    AFTER_CROSS = "cross_adapter"
    AFTER_FEED_FORWARD = "output_adapter"
    QUERY = "q"
    KEY = "k"
    VALUE = "v"
    FUSED = "qkv"  # one layer gives queries, keys and values (GPT-2)
    INTERMEDIATE = "intermediate_lora"
    OUTPUT = "output_lora"
    EMBEDDED = "inv_adapter"  # what enters the first layer
    AFTER_LAYER = "output_reft"  # what leaves a layer


class Attends(StrEnum):
    """Which attention of a model a prefix stands in front of."""

    OWN = "own"  # the decoder's over its own tokens, or an encoder's
    SOURCE = "source"  # the encoder's, on an encoder-decoder
    CROSS = "cross"  # the decoder's over the encoded source


OWN_PREFIX: Final[Mapping[str, Attends]] = MappingProxyType({"self_prefix": Attends.OWN})
ENCODER_PREFIX: Final[Mapping[str, Attends]] = MappingProxyType({"encoder_prefix": Attends.SOURCE})
DECODER_PREFIXES: Final[Mapping[str, Attends]] = MappingProxyType({**OWN_PREFIX, "cross_prefix": Attends.CROSS})


SUBLAYERS: Final = frozenset({Role.AFTER_ATTENTION, Role.AFTER_CROSS, Role.AFTER_FEED_FORWARD})


@dataclass(frozen=True, slots=True, kw_only=True)
class Sublayer:
    """A residual sublayer, by paths within its layer."""

    role: Role
    site: str  # the name in checkpoints
    output: str  # the module whose result, or the first of whose results, is added to the residual
    residual: str  # the module whose first argument is the residual
    norm: str | None = None  # the norm behind the addition, where there is one


@dataclass(frozen=True, slots=True, kw_only=True)
class Stack:
    """The layers of a body or of one side of it."""

    layers: str  # path of the list within the body
    sublayers: tuple[Sublayer, ...]
    linears: Mapping[str, Role]
    invertible: str | None = None  # path of the coupling's site within the body
    prefixes: Mapping[str, Attends] = field(default_factory=dict)  # prefixes by the names that their tensors carry
    takes_prompt: bool = False  # whether the library can put a soft prompt in front
    counts_distances: bool = False  # scores depend on the distance, prefixes counted


@dataclass(frozen=True, slots=True)
class Place:
    """What a site is to AdapterHub. Layers are counted through all stacks, the encoder's first."""

    role: Role
    layer: int
    has_norm: bool = False  # of a sublayer: whether a norm follows the addition


def _bert(suffix: str = "") -> tuple[Stack, ...]:
    """BERT and its kin; `suffix` ends the names of the attention's projections."""
    after_attention = Sublayer(
        role=Role.AFTER_ATTENTION,
        site="attention.output",
        output="attention.output.dense",
        residual="attention.self",
        norm="attention.output.LayerNorm",
    )
    after_feed_forward = Sublayer(
        role=Role.AFTER_FEED_FORWARD,
        site="output",
        output="output.dense",
        residual="intermediate",
        norm="output.LayerNorm",
    )
    linears = {
        f"attention.self.query{suffix}": Role.QUERY,
        f"attention.self.key{suffix}": Role.KEY,
        f"attention.self.value{suffix}": Role.VALUE,
        "intermediate.dense": Role.INTERMEDIATE,
        "output.dense": Role.OUTPUT,
    }
    return (
        Stack(
            layers="encoder.layer",
            sublayers=(after_attention, after_feed_forward),
            linears=linears,
            invertible=INVERTIBLE,
            # DeBERTa scores by content and by distance at once, in an attention that the server cannot replace.
            prefixes={} if suffix else OWN_PREFIX,
            takes_prompt=not suffix,
        ),
    )


def _distilbert() -> tuple[Stack, ...]:
    after_attention = Sublayer(
        role=Role.AFTER_ATTENTION,
        site="attention_adapters",
        output="attention",
        residual="attention",
        norm="sa_layer_norm",
    )
    after_feed_forward = Sublayer(
        role=Role.AFTER_FEED_FORWARD,
        site="output_adapters",
        output="ffn",
        residual="ffn",
        norm="output_layer_norm",
    )
    linears = {
        "attention.q_lin": Role.QUERY,
        "attention.k_lin": Role.KEY,
        "attention.v_lin": Role.VALUE,
        "ffn.lin1": Role.INTERMEDIATE,
        "ffn.lin2": Role.OUTPUT,
    }
    return (
        Stack(
            layers="transformer.layer",
            sublayers=(after_attention, after_feed_forward),
            linears=linears,
            invertible=INVERTIBLE,
            prefixes={"self": Attends.OWN},
        ),
    )


def _before_norms(attention: str, first_norm: str, feed_forward: str, second_norm: str) -> tuple[Sublayer, ...]:
    """The sublayers of a layer that norms what enters them and nothing after."""
    return (
        Sublayer(role=Role.AFTER_ATTENTION, site="attention_adapters", output=attention, residual=first_norm),
        Sublayer(role=Role.AFTER_FEED_FORWARD, site="output_adapters", output=feed_forward, residual=second_norm),
    )


def _llama() -> tuple[Stack, ...]:
    linears = {
        "self_attn.q_proj": Role.QUERY,
        "self_attn.k_proj": Role.KEY,
        "self_attn.v_proj": Role.VALUE,
        "mlp.down_proj": Role.INTERMEDIATE,  # AdapterHub calls them so, though data flows the other way
        "mlp.up_proj": Role.OUTPUT,
    }
    sublayers = _before_norms("self_attn", "input_layernorm", "mlp", "post_attention_layernorm")
    stack = Stack(layers="layers", sublayers=sublayers, linears=linears, invertible=INVERTIBLE, prefixes=OWN_PREFIX)
    return (stack,)


def _gpt2() -> tuple[Stack, ...]:
    linears = {"attn.c_attn": Role.FUSED, "mlp.c_fc": Role.INTERMEDIATE, "mlp.c_proj": Role.OUTPUT}
    sublayers = _before_norms("attn", "ln_1", "mlp", "ln_2")
    return (Stack(layers="h", sublayers=sublayers, linears=linears, invertible=INVERTIBLE, prefixes=OWN_PREFIX),)


def _t5_sublayer(role: Role, number: int, module: str) -> Sublayer:
    at = f"layer.{number}"
    return Sublayer(role=role, site=at, output=f"{at}.{module}", residual=f"{at}.layer_norm")


def _t5_linears(attentions: Collection[str], feed_forward: str) -> dict[str, Role]:
    linears = {f"{a}.{n}": Role(n) for a in attentions for n in ("q", "k", "v")}
    # A gated feed-forward layer has wi_0 and wi_1, of which AdapterHub adapts the second.
    first = dict.fromkeys((f"{feed_forward}.wi", f"{feed_forward}.wi_1"), Role.INTERMEDIATE)
    return {**linears, **first, f"{feed_forward}.wo": Role.OUTPUT}


def _t5() -> tuple[Stack, ...]:
    attention = _t5_sublayer(Role.AFTER_ATTENTION, 0, "SelfAttention")
    return (
        Stack(
            layers="encoder.block",
            sublayers=(attention, _t5_sublayer(Role.AFTER_FEED_FORWARD, 1, "DenseReluDense")),
            linears=_t5_linears(["layer.0.SelfAttention"], "layer.1.DenseReluDense"),
            invertible=f"encoder.{INVERTIBLE}",
            prefixes=ENCODER_PREFIX,
            counts_distances=True,
        ),
        Stack(
            layers="decoder.block",
            sublayers=(
                attention,
                _t5_sublayer(Role.AFTER_CROSS, 1, "EncDecAttention"),
                _t5_sublayer(Role.AFTER_FEED_FORWARD, 2, "DenseReluDense"),
            ),
            linears=_t5_linears(["layer.0.SelfAttention", "layer.1.EncDecAttention"], "layer.2.DenseReluDense"),
            prefixes=DECODER_PREFIXES,
            counts_distances=True,
        ),
    )


def _bart_sublayer(role: Role, site: str, modules: tuple[str, str], norm: str) -> Sublayer:
    residual, output = modules
    return Sublayer(role=role, site=site, output=output, residual=residual, norm=norm)


def _bart_linears(attentions: Collection[str]) -> dict[str, Role]:
    linears = {f"{a}.{n}_proj": Role(n) for a in attentions for n in ("q", "k", "v")}
    return {**linears, "fc1": Role.INTERMEDIATE, "fc2": Role.OUTPUT}


def _bart() -> tuple[Stack, ...]:
    attention = _bart_sublayer(
        Role.AFTER_ATTENTION, "attention_adapters", ("self_attn", "self_attn"), "self_attn_layer_norm"
    )
    cross = _bart_sublayer(
        Role.AFTER_CROSS, "cross_attention_adapters", ("encoder_attn", "encoder_attn"), "encoder_attn_layer_norm"
    )
    feed_forward = _bart_sublayer(Role.AFTER_FEED_FORWARD, "output_adapters", ("fc1", "fc2"), "final_layer_norm")
    return (
        Stack(
            layers="encoder.layers",
            sublayers=(attention, feed_forward),
            linears=_bart_linears(["self_attn"]),
            invertible=f"encoder.{INVERTIBLE}",
            prefixes=ENCODER_PREFIX,
        ),
        Stack(
            layers="decoder.layers",
            sublayers=(attention, cross, feed_forward),
            linears=_bart_linears(["self_attn", "encoder_attn"]),
            prefixes=DECODER_PREFIXES,
        ),
    )


FAMILIES: Final[Mapping[str, tuple[Stack, ...]]] = MappingProxyType(
    {
        "bert": _bert(),
        "roberta": _bert(),
        "xlm-roberta": _bert(),
        "electra": _bert(),
        "deberta-v2": _bert("_proj"),
        "distilbert": _distilbert(),
        "llama": _llama(),
        "mistral": _llama(),
        "gpt2": _gpt2(),
        "t5": _t5(),
        "mt5": _t5(),
        "bart": _bart(),
    }
)
"""By transformers' `model_type`."""


def places_in(base: Base) -> dict[str, Place]:
    """What AdapterHub could act on in the base, by site path."""
    found: dict[str, Place] = {}
    first_layer = 0
    paths = {path.removeprefix(f"{base.body_prefix}."): path for path in base.sites}
    for stack in FAMILIES.get(base.family, ()):
        num_layers = 0
        for short, path in paths.items():
            number, inner = _split(short, stack.layers)
            place = None if number is None else _place(stack, inner, base.sites[path].kind, first_layer + number)
            num_layers = max(num_layers, 0 if number is None else number + 1)
            if place is None and short == stack.invertible:
                place = Place(Role.EMBEDDED, first_layer)
            if place is not None:
                found[path] = place
        first_layer += num_layers
    return found


def stacks_of(base: Base) -> Iterator[tuple[Stack, range]]:
    """The stacks of the base with the numbers of their layers, counted through all of them."""
    first_layer = 0
    shorts = [path.removeprefix(f"{base.body_prefix}.") for path in base.sites]
    for stack in FAMILIES.get(base.family, ()):
        numbers = (_split(short, stack.layers)[0] for short in shorts)
        num_layers = max((number + 1 for number in numbers if number is not None), default=0)
        yield stack, range(first_layer, first_layer + num_layers)
        first_layer += num_layers


def _split(short: str, layers: str) -> tuple[int | None, str]:
    """The number of the layer a path lies in, and the path within."""
    number, _, inner = short.removeprefix(f"{layers}.").partition(".")
    return (int(number), inner) if short.startswith(f"{layers}.") and number.isdecimal() else (None, "")


def _place(stack: Stack, inner: str, kind: SiteKind, layer: int) -> Place | None:
    if kind is SiteKind.LAYER:
        return Place(Role.AFTER_LAYER, layer) if inner == AFTER_LAYER else None
    if kind is SiteKind.SUBLAYER:
        sublayer = next((one for one in stack.sublayers if one.site == inner), None)
        return None if sublayer is None else Place(sublayer.role, layer, sublayer.norm is not None)
    role = stack.linears.get(inner)
    return None if role is None else Place(role, layer)
