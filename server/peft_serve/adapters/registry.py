"""What the gate and the compiler know about one peft type: schema, tensor layout, and the function that compiles it.

A method is one pure function and one decorator:

    @compiles("LORA", schema=..., layout=...)
    def lora(site: Site) -> Edit: ...

`methods/` holds them by family and gathers them. Knows no method by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from peft_serve.adapters.base import Base, BaseShape, SiteKind, SiteSpec
from peft_serve.adapters.config_schema import Config, ConfigSchema
from peft_serve.adapters.primitives import Edit, KVPrefix, SoftPrompt

Shape = tuple[int, ...]

DENSE = frozenset({SiteKind.LINEAR, SiteKind.CONV1D})


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteLayout:
    """The tensors a method saves at a site: suffix -> the shapes it may have. All of them must be there."""

    tensors: Mapping[str, tuple[Shape, ...]]
    rank: int = 0  # of the low-rank term it compiles to
    leftovers: tuple[str, ...] = ()  # beginnings of suffixes that training leaves behind and nothing reads


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """One place of the base with the tensors a checkpoint has for it, all float32."""

    spec: SiteSpec
    config: Config
    tensors: Mapping[str, Tensor]  # by suffix, as in the layout
    shared: Mapping[str, Tensor]  # the method's tensors that belong to no site
    base: Base

    @property
    def weight_OI(self) -> Tensor:  # noqa: N802 - the suffix names dimensions
        return self.base.weight(self.spec.path).cpu()

    @property
    def bias_O(self) -> Tensor | None:  # noqa: N802 - the suffix names dimensions
        bias = self.base.bias(self.spec.path)
        return None if bias is None else bias.cpu()


@dataclass(frozen=True, slots=True, kw_only=True)
class Sequence:
    """What a sequence-level method compiles from: its float32 tensors, the config and the base's numbers."""

    config: Config
    tensors: Mapping[str, Tensor]
    base: BaseShape


SiteCompile = Callable[[Site], Edit]
SequenceCompile = Callable[[Sequence], SoftPrompt | KVPrefix]
LayoutOfSite = Callable[[SiteSpec, Config], SiteLayout]
LayoutOfShared = Callable[[Config, Base], Mapping[str, Shape]]


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteMethod:
    """A type whose tensors belong to sites: keys `base_model.model.<path>.<suffix>`."""

    peft_type: str
    schema: ConfigSchema
    kinds: frozenset[SiteKind]
    layout: LayoutOfSite
    compile: SiteCompile
    shared: LayoutOfShared  # keys `base_model.<name>`


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceMethod:
    """A type that stands in front of the sequence: keys without a prefix, saved modules under `base_model.`.

    `layout` raises `AdapterInvalid` when the config does not fit the base.
    """

    peft_type: str
    schema: ConfigSchema
    layout: Callable[[Config, BaseShape], Mapping[str, Shape]]
    compile: SequenceCompile


Method = SiteMethod | SequenceMethod


def _nothing_shared(config: Config, base: Base) -> Mapping[str, Shape]:  # noqa: ARG001 - the signature is the contract
    return {}


@dataclass(frozen=True, slots=True)
class compiles:  # noqa: N801 - a decorator, named as it is used
    """Make a `SiteMethod` of the function that compiles one site."""

    peft_type: str
    schema: ConfigSchema = field(kw_only=True)
    layout: LayoutOfSite = field(kw_only=True)
    kinds: frozenset[SiteKind] = field(default=DENSE, kw_only=True)
    shared: LayoutOfShared = field(default=_nothing_shared, kw_only=True)

    def __call__(self, function: SiteCompile) -> SiteMethod:
        return SiteMethod(
            peft_type=self.peft_type,
            schema=self.schema,
            kinds=self.kinds,
            layout=self.layout,
            compile=function,
            shared=self.shared,
        )


@dataclass(frozen=True, slots=True)
class prepends:  # noqa: N801 - a decorator, named as it is used
    """Make a `SequenceMethod` of the function that compiles what stands in front of the sequence."""

    peft_type: str
    schema: ConfigSchema = field(kw_only=True)
    layout: Callable[[Config, BaseShape], Mapping[str, Shape]] = field(kw_only=True)

    def __call__(self, function: SequenceCompile) -> SequenceMethod:
        return SequenceMethod(peft_type=self.peft_type, schema=self.schema, layout=self.layout, compile=function)
