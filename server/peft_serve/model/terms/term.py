"""The contract of a term: one kind of edit at one site.

A term keeps its part of every installed adapter's edit and, for a route, gives an op on the tokens, or None when no
active adapter has such a part here: what nobody uses costs nothing. Which tokens belong to whom is `routing`'s.

Shapes in this package: `T` tokens of the stream, `I` in and `O` out features (`D` either), `S` slots, `N` tokens
of some of the adapters. At an embedding x is the ids [T] and `I` counts the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from peft_serve.adapters.primitives import Edit
from peft_serve.kernels.bottleneck import BottleneckKernels
from peft_serve.kernels.gated import GatedKernels
from peft_serve.kernels.mixing import MixingKernels
from peft_serve.model.routing import Route

InOp = Callable[[Tensor], Tensor]
"""x -> x', a new tensor."""
OutOp = Callable[[Tensor, Tensor], object]
"""(y [T, O], x) -> y changed in place."""
OwnOp = Callable[[Tensor], Tensor]


class Term(Protocol):
    """One kind of edit at one site."""

    def put(self, slot: int, edit: Edit) -> None:
        """Keep what concerns this term; often nothing. Raises ValueError where only the term can see a mistake."""
        ...

    def drop(self, slot: int) -> None:
        """Forget the slot, if it has something here."""
        ...


class InTerm(Term, Protocol):
    def op(self, route: Route) -> InOp | None: ...


class OutTerm(Term, Protocol):
    def op(self, route: Route) -> OutOp | None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class OtherKernels:
    """Kernels for terms that are not low-rank; None: there are none of the kind."""

    mixing: MixingKernels
    bottlenecks: BottleneckKernels | None = None
    gated: GatedKernels | None = None


@runtime_checkable
class UsesOthers(Protocol):
    """A term that such a kernel may run."""

    def use_others(self, kernels: OtherKernels) -> None:
        """Run by a kernel from now on, where it can. No adapter is here yet."""
        ...
