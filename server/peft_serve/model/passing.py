"""What the decoder layers of a base know of the pass that runs: its tokens as their kernels read them, and each other.

Gone with the pass, all but one thing: which layer follows which. That is seen, not read off the model: a layer follows
another if it was called with what that one gave, and with the same angles.
"""

from __future__ import annotations

from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from torch import Tensor

from peft_serve.kernels.layer import KernelLayer, Step, StepFacts
from peft_serve.model.attention import RaggedAttention, Work
from peft_serve.model.paged import PagedDecode
from peft_serve.model.rotary_attention import RotaryAttention
from peft_serve.model.routing import Route

if TYPE_CHECKING:
    from peft_serve.model.whole_layer import WholeLayer

Angles = tuple[Tensor, Tensor]


class Passing:
    """One pass through the layers."""

    def __init__(self) -> None:
        self.steps: dict[tuple[object, ...], Step] = {}
        self._entered: tuple[Tensor, Angles] | None = None  # by the layer that was last called to run
        self._last: WholeLayer | None = None  # that has run
        self._ahead: frozenset[WholeLayer] = frozenset()  # that have run, and are yet to be called
        self._given: Tensor | None = None

    def has_run(self, layer: WholeLayer, x: Tensor) -> bool:
        """Whether it ran in one call with one before it; `x` is what the last of them gave."""
        if layer not in self._ahead:
            return False
        assert x is self._given, "nothing changes what passes between layers that run in one call"
        return True

    def enter(self, layer: WholeLayer, x: Tensor, angles: Angles) -> None:
        """The layer is about to run on `x`."""
        last = self._last
        is_next = last is not None and x is self._given and self._entered is not None and self._entered[1] is angles
        if is_next and last is not None and last.follower is None and last.is_alike(layer):
            last.follower = layer
        self._entered = x, angles

    def leave(self, layers: tuple[WholeLayer, ...], y: Tensor) -> Tensor:
        """These have run, the first of them called; gives what they gave."""
        self._last, self._ahead, self._given = layers[-1], frozenset(layers[1:]), y
        return y


class StepBook:
    """What the layers of one base are told of the pass that runs; gone with it."""

    def __init__(self, attention: RaggedAttention, paged: PagedDecode) -> None:
        self.attention = attention
        self.paged = paged
        self._passing: WeakKeyDictionary[Work, Passing] = WeakKeyDictionary()

    def passing(self, work: Work) -> Passing:
        """The pass that does this work."""
        found = self._passing.get(work)
        if found is None:
            found = self._passing[work] = Passing()
        return found

    def step(self, work: Work, angles: Angles, layer: KernelLayer, part: RotaryAttention, route: Route | None) -> Step:
        """The pass, as layers of these sizes, this attention and these angles see it."""
        steps = self.passing(work).steps
        key = (id(angles[0]), part.terms.window, layer.sizes)  # the step holds the angles: no others have their id
        if key not in steps:
            steps[key] = layer.step(self._facts(work, angles, part, route))
        return steps[key]

    def _facts(self, work: Work, angles: Angles, part: RotaryAttention, route: Route | None) -> StepFacts:
        plan = work.plan
        assert plan.writes_T is not None, "a decoder keeps what it reads"
        return StepFacts(
            num_tokens=len(plan.writes_T),
            places_T=plan.writes_T,
            angles=angles,
            rows=self.paged.rows(plan.cached[0], part.terms) if plan.is_one_group else None,
            segments=None if route is None else route.segments,
            slot_T=None if route is None else route.slot_of_token,
        )
