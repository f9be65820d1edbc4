"""The low-rank term: y + B A x, by a kernel of our own where there is one, else from the hot stacks (see `stacks`)."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from peft_serve.adapters.base import SiteKind, SiteSpec
from peft_serve.adapters.primitives import Affine, Edit, LowRank
from peft_serve.kernels import grouped
from peft_serve.kernels.grids import add_low_rank_grids_
from peft_serve.kernels.low_rank import Factors, LayerFactors, LooksUp, LowRankKernels
from peft_serve.kernels.slot_numbers import SlotFactors
from peft_serve.model.routing import Route, Way
from peft_serve.model.stacks import Place, SiteStack
from peft_serve.model.terms.term import OutOp


class LowRankDelta:
    """y -> y + B A x. A scaled embedding's scale is in B since it was compiled.

    With a kernel the factors are read where they are, and nothing is written when adapters become hot. An embedding
    has its ids looked up in the stacks all the same where the kernel knows no ids.
    """

    def __init__(self, spec: SiteSpec, like: Tensor) -> None:
        self._like = like
        self._spec = spec
        self._direct: Factors | None = None
        self._is_lookup = spec.kind is SiteKind.EMBEDDING
        self._width = spec.out_features + (1 if self._is_lookup else spec.in_features)
        self._slots: set[int] = set()
        self._factors: dict[int, LowRank] = {}  # by slot, for the stacks
        self._stack = SiteStack(spec.in_features, spec.out_features)

    @property
    def is_direct(self) -> bool:
        """Whether a kernel runs it that takes x and y of any number of axes."""
        return self._direct is not None and not self._is_lookup

    @property
    def fuses_vectors(self) -> bool:
        """Whether the kernel that runs it takes the vectors beside it too."""
        return self._direct is not None and self._direct.fuses_vectors

    def use(self, kernel: LowRankKernels) -> None:
        """Run by the kernel from now on, where it can. No adapter is here yet."""
        assert not self._slots, "the choice is made before adapters are installed"
        if not kernel.serves(self._like):
            return
        num_in, num_out, dtype = self._spec.in_features, self._spec.out_features, self._like.dtype
        if not self._is_lookup:
            self._direct = kernel.layer(num_in, num_out, dtype, self._spec.path.rpartition(".")[0])
        elif isinstance(kernel, LooksUp):
            self._direct = kernel.lookup(num_in, num_out, dtype)

    def by_slot(self, route: Route) -> SlotFactors | None:
        """The factors as the kernel reads them for the adapters of a route, if a kernel runs them."""
        return self._direct.by_slot(route.segments) if isinstance(self._direct, LayerFactors) else None

    def put(self, slot: int, edit: Edit) -> None:
        if not isinstance(edit, Affine) or edit.delta is None:
            return
        a_RI, b_OR = edit.delta.a_RI, edit.delta.b_OR
        if self._direct is not None:
            self._direct.put(slot, a_RI, b_OR)
        else:
            self._factors[slot] = LowRank(a_RI.to(self._like), b_OR.to(self._like))
        self._slots.add(slot)

    def put_early(self, slot: int, edit: Edit, wait: Callable[[], None]) -> None:
        """`put` factors that are on their way to the device; `wait` has it wait for them.

        Where a kernel reads them where they lie, it does so when a pass comes here for the first time, and else now.
        """
        if not isinstance(edit, Affine) or edit.delta is None:
            return
        if self._direct is None:
            wait()
            self.put(slot, edit)
        else:
            self._direct.put_early(slot, edit.delta.a_RI, edit.delta.b_OR, wait)
            self._slots.add(slot)

    def drop(self, slot: int) -> None:
        self._slots.discard(slot)
        self._factors.pop(slot, None)
        if self._direct is not None:
            self._direct.drop(slot)

    def reset(self) -> None:
        """The layout has another size."""
        self._stack.reset()

    def write(self, slot: int, place: Place, capacity: int) -> None:
        """The slot has a new place in the layout."""
        if self._direct is not None:
            return
        if slot in self._factors:
            factors = self._factors[slot]
            self._stack.write(place, capacity, factors.a_RI, factors.b_OR)
        else:
            self._stack.blank(place)

    def op(self, route: Route, out_scale: Tensor | None = None, shift: Tensor | None = None) -> OutOp | None:
        """With tables of vectors by slot, for a kernel that takes them: y = out_scale * y + B A x + shift."""
        slots = route.active.intersection(self._slots)
        if not slots:
            return None
        if self._direct is not None:
            return self._direct.op(route.segments, out_scale, shift)
        span = route.span(slots)
        a_RI, b_RO = self._stack.rows(span.first, span.last)
        way = span.way(self._width)
        if way is Way.GRIDS and span.grids is not None and not self._is_lookup:
            grid_parts = tuple((grid, grid.rows(a_RI), grid.rows(b_RO)) for grid in span.grids)
            return lambda y_TO, x: add_low_rank_grids_(y_TO, x, grid_parts)
        if way is not Way.MASKED:
            parts = grouped.parts_of(a_RI, b_RO, span.pieces)
            runs = grouped.add_low_rank_lookup_runs_ if self._is_lookup else grouped.add_low_rank_runs_
            return lambda y_TO, x: runs(y_TO, x, parts)
        foreign_TR = span.foreign
        masked = grouped.add_low_rank_lookup_ if self._is_lookup else grouped.add_low_rank_
        return lambda y_TO, x: masked(y_TO, x, a_RI, b_RO, foreign_TR)
