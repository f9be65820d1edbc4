"""What the gate and the compiler know about one peft type: schema, tensor layout, and the function that compiles it.

A method is one pure function and one decorator:

    @compiles("LORA", schema=..., layout=...)
    def lora(site: Site) -> Edit: ...

`methods/` holds them by family and gathers them. Knows no method by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from peft_serve.adapters.base import Base, BaseShape, SiteKind, SiteSpec
from peft_serve.adapters.config_schema import Config, ConfigSchema
from peft_serve.adapters.primitives import Edit, KVPrefix, Prefixes, SoftPrompt
from peft_serve.adapters.targets import Named, named_by_modules

Shape = tuple[int, ...]
Stored = Mapping[str, Shape]
"""The tensors a checkpoint has at a place, by suffix or name, with their shapes: untrusted."""

DENSE = frozenset({SiteKind.LINEAR, SiteKind.CONV1D})


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteLayout:
    """The tensors a method saves at a site: suffix -> the shapes it may have. All of them must be there.

    `indices` names those that hold integers, each with the bound its values stay below.
    """

    tensors: Mapping[str, tuple[Shape, ...]]
    rank: int = 0  # of the low-rank term it compiles to
    indices: Mapping[str, int] = field(default_factory=dict)
    leftovers: tuple[str, ...] = ()  # beginnings of suffixes that training leaves behind and nothing reads
    num_values: int = 0  # numbers it compiles to, where those may be more than are stored; never more than it takes
    work: int = 0  # floating-point operations of compiling it, where those are not few for each number stored


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedLayout:
    """The tensors a method saves once for all sites, by name; all of them must be there."""

    tensors: Mapping[str, Shape] = field(default_factory=dict)
    indices: Mapping[str, int] = field(default_factory=dict)
    leftovers: tuple[str, ...] = ()  # beginnings of names that nothing reads


@dataclass(frozen=True, slots=True, kw_only=True)
class Whole:
    """An adapter as a whole, for a method whose sites depend on each other."""

    config: Config
    shared: Mapping[str, Tensor]
    targets: tuple[SiteSpec, ...]  # every site the method acts on, in the module order of the base
    base: Base


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """One place of the base with the tensors a checkpoint has for it: float32, int64 where they are indices."""

    spec: SiteSpec
    config: Config
    tensors: Mapping[str, Tensor]  # by suffix, as in the layout
    shared: Mapping[str, Tensor]  # the method's tensors that belong to no site
    base: Base
    targets: tuple[SiteSpec, ...] = ()  # every site the method acts on, in the module order of the base
    prepared: Any = None  # what the method's `prepare` made, once for all sites

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


SiteCompile = Callable[[Site], Edit | None]
SequenceCompile = Callable[[Sequence], SoftPrompt | KVPrefix]
PrefixCompile = Callable[[Mapping[str, Tensor]], Prefixes]
LayoutOfSite = Callable[[SiteSpec, Config, Stored], SiteLayout]
LayoutOfShared = Callable[[Config, Base, Stored], SharedLayout]
LayoutOfSequence = Callable[[Config, BaseShape], Mapping[str, Shape]]
NamesOfSites = Callable[[Config, Base], Named]


def _no_start(config: Config) -> tuple[int, ...]:  # noqa: ARG001 - the signature is the contract
    return ()


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteMethod:
    """A type whose tensors belong to sites: keys `base_model.model.<path>.<suffix>`.

    A layout raises `AdapterInvalid` when config, base and stored shapes do not go together.
    """

    peft_type: str
    schema: ConfigSchema
    kinds: frozenset[SiteKind]
    layout: LayoutOfSite
    compile: SiteCompile
    shared: LayoutOfShared  # keys `base_model.<name>`
    prepare: Callable[[Whole], Any] | None  # runs once for an adapter, before its sites are compiled
    start: Callable[[Config], tuple[int, ...]]  # the token ids that switch the adapter on
    has_site_tensors: bool  # False: every site that target_modules names is one, without a tensor of its own
    num_tasks: Callable[[Config], int]  # tasks that one checkpoint holds; a request says which one it wants
    named: NamesOfSites  # which sites the config speaks of
    fits_any_weight: Callable[[Config], bool]  # its low-rank terms do not depend on the weight they were trained on
    may_be_empty: bool  # training may leave a tensor with a side of 0; a site that comes to nothing compiles to None
    prefixes: PrefixCompile | None = None  # what the shared tensors put in front of attention, beside the sites


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceMethod:
    """A type that stands in front of the sequence: keys without a prefix, saved modules under `base_model.`.

    `layout` raises `AdapterInvalid` when the config does not fit the base.
    """

    peft_type: str
    schema: ConfigSchema
    layout: LayoutOfSequence
    compile: SequenceCompile
    num_tasks: Callable[[Config], int]


Method = SiteMethod | SequenceMethod

TASK_FIELD = "task_id"
"""Where a compile function finds the task it is asked for in its config, if its method has more than one."""


def _nothing_shared(config: Config, base: Base, stored: Stored) -> SharedLayout:  # noqa: ARG001 - the contract
    return SharedLayout()


def _on_its_own_base(config: Config) -> bool:  # noqa: ARG001 - the signature is the contract
    return False


def _one_task(config: Config) -> int:  # noqa: ARG001 - the signature is the contract
    return 1


@dataclass(frozen=True, slots=True)
class compiles:  # noqa: N801 - a decorator, named as it is used
    """Make a `SiteMethod` of the function that compiles one site."""

    peft_type: str
    schema: ConfigSchema = field(kw_only=True)
    layout: LayoutOfSite = field(kw_only=True)
    kinds: frozenset[SiteKind] = field(default=DENSE, kw_only=True)
    shared: LayoutOfShared = field(default=_nothing_shared, kw_only=True)
    prepare: Callable[[Whole], Any] | None = field(default=None, kw_only=True)
    start: Callable[[Config], tuple[int, ...]] = field(default=_no_start, kw_only=True)
    has_site_tensors: bool = field(default=True, kw_only=True)
    num_tasks: Callable[[Config], int] = field(default=_one_task, kw_only=True)
    named: NamesOfSites = field(default=named_by_modules, kw_only=True)
    fits_any_weight: Callable[[Config], bool] = field(default=_on_its_own_base, kw_only=True)
    may_be_empty: bool = field(default=False, kw_only=True)

    def __call__(self, function: SiteCompile) -> SiteMethod:
        return SiteMethod(
            peft_type=self.peft_type,
            schema=self.schema,
            kinds=self.kinds,
            layout=self.layout,
            compile=function,
            shared=self.shared,
            prepare=self.prepare,
            start=self.start,
            has_site_tensors=self.has_site_tensors,
            num_tasks=self.num_tasks,
            named=self.named,
            fits_any_weight=self.fits_any_weight,
            may_be_empty=self.may_be_empty,
        )


@dataclass(frozen=True, slots=True)
class prepends:  # noqa: N801 - a decorator, named as it is used
    """Make a `SequenceMethod` of the function that compiles what stands in front of the sequence."""

    peft_type: str
    schema: ConfigSchema = field(kw_only=True)
    layout: LayoutOfSequence = field(kw_only=True)
    num_tasks: Callable[[Config], int] = field(default=_one_task, kw_only=True)

    def __call__(self, function: SequenceCompile) -> SequenceMethod:
        return SequenceMethod(
            peft_type=self.peft_type,
            schema=self.schema,
            layout=self.layout,
            compile=function,
            num_tasks=self.num_tasks,
        )
