"""Bottlenecks by a kernel: those of one form together, whatever their sizes and the lengths of their runs.

What is asked of the device depends on the forms of a step's adapters alone: a form has a table of parameters and one of
truth values, which say by slot who has such a bottleneck. Results are computed for all tokens, as far as the kernel
does not pass them over, and put where they belong by choice, so that nothing of other tokens changes.

Shapes: `T` tokens of the stream, `S` slots, `D` features of the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from peft_serve.adapters.sublayer_primitives import Bottleneck, LearnedNorm, Reads
from peft_serve.kernels.bottleneck import BottleneckKernels, Lift, Squeeze, Squeezes
from peft_serve.kernels.subsets import Chosen
from peft_serve.model.routing import Route
from peft_serve.model.terms.tables import SlotTable, TruthTable

_NORM_EPS: Final = 1e-5
_MOST_FORMS: Final = 8  # of a sublayer, until those that nobody has make room


@dataclass(frozen=True, slots=True)
class _Form:
    """What bottlenecks have in common that are computed together."""

    activation: str
    reads: Reads
    keeps: Reads
    norms_before: bool
    norms_after: bool
    norms_kept: bool
    is_final: bool


@dataclass(frozen=True, slots=True)
class SlotNorm:
    """The norms that adapters bring along."""

    weight_SD: Tensor
    bias_SD: Tensor
    slot_T: Tensor

    def of(self, x_TD: Tensor) -> Tensor:
        weight_TD, bias_TD = (each.index_select(0, self.slot_T) for each in (self.weight_SD, self.bias_SD))
        return layer_norm(x_TD, x_TD.shape[-1:], eps=_NORM_EPS) * weight_TD + bias_TD


@dataclass(frozen=True, slots=True, kw_only=True)
class LiftedPart:
    """The tokens of adapters that have bottlenecks of one form."""

    subset: Chosen
    lift: Lift
    reads: Reads
    keeps: Reads
    norm_before: SlotNorm | None
    norm_after: SlotNorm | None
    norms_kept: bool
    is_final: bool

    @property
    def streams(self) -> frozenset[Reads]:
        """What of the sublayer it has to see."""
        return frozenset({self.reads, self.keeps})

    def of(self, streams: Mapping[Reads, Tensor]) -> Tensor:
        """What becomes of its tokens, [T, D], from the streams [T, D] that it has to see; of others it says nothing."""
        x_TD, kept_TD = streams[self.reads], streams[self.keeps]
        if self.norm_before is not None:
            x_TD = self.norm_before.of(x_TD)
        y_TD = self.lift(x_TD)
        if self.norm_after is None:
            return y_TD + kept_TD
        if self.norms_kept:
            return self.norm_after.of(y_TD + kept_TD)
        return self.norm_after.of(y_TD) + kept_TD


class _Norms:
    """Norms by slot."""

    def __init__(self, like_D: Tensor) -> None:
        self._weight, self._bias = SlotTable(torch.ones_like(like_D)), SlotTable(torch.zeros_like(like_D))

    def put(self, slot: int, norm: LearnedNorm) -> None:
        self._weight.put(slot, norm.weight_D)
        self._bias.put(slot, norm.bias_D)

    def drop(self, slot: int) -> None:
        self._weight.drop(slot)
        self._bias.drop(slot)

    def of(self, route: Route) -> SlotNorm:
        """For a route with an adapter that has one."""
        slot_T, also_T = self._weight.index(route), self._bias.index(route)
        assert slot_T is not None, "somebody has one"
        assert slot_T is also_T, "who has a weight has a bias"
        return SlotNorm(self._weight.rows, self._bias.rows, slot_T)


class _OfForm:
    """The bottlenecks of one form."""

    def __init__(self, form: _Form, squeezes: Squeezes, like_D: Tensor) -> None:
        self.form = form
        self.squeezes = squeezes
        self._own = TruthTable(like_D.device)
        self._before = _Norms(like_D) if form.norms_before else None
        self._after = _Norms(like_D) if form.norms_after else None

    @property
    def slots(self) -> set[int]:
        return self._own.slots

    def put(self, slot: int, edit: Bottleneck) -> None:
        squeeze = Squeeze(
            down_BD=edit.down_BD,
            down_bias_B=edit.down_bias_B,
            up_DB=edit.up_DB,
            up_bias_D=edit.up_bias_D,
            scale_D=edit.scale.expand_as(edit.up_bias_D),
        )
        self.squeezes.put(slot, squeeze)
        for norms, norm in ((self._before, edit.norm_before), (self._after, edit.norm_after)):
            if norms is not None and norm is not None:
                norms.put(slot, norm)
        self._own.add(slot)

    def drop(self, slot: int) -> None:
        self.squeezes.drop(slot)
        for norms in (self._before, self._after):
            if norms is not None:
                norms.drop(slot)
        self._own.drop(slot)

    def end(self) -> None:
        """Nobody has one; what was captured for this form is not to be replayed."""
        self._own.end()

    def part(self, route: Route) -> LiftedPart | None:
        """What those of the active slots do, if there are any."""
        slot_T = self._own.index(route)
        if slot_T is None:
            return None
        return LiftedPart(
            subset=Chosen(self._own.rows, slot_T),
            lift=self.squeezes.op(route.segments, self.form.activation),
            reads=self.form.reads,
            keeps=self.form.keeps,
            norm_before=None if self._before is None else self._before.of(route),
            norm_after=None if self._after is None else self._after.of(route),
            norms_kept=self.form.norms_kept,
            is_final=self.form.is_final,
        )


class Lifted:
    """The bottlenecks of one sublayer that a kernel computes, if there is one."""

    def __init__(self, like: Tensor) -> None:
        self.kernel: BottleneckKernels | None = None
        self._like = like
        self._forms: dict[_Form, _OfForm] = {}  # the oldest first; they stay for whoever comes next

    def __bool__(self) -> bool:
        return any(each.slots for each in self._forms.values())

    def serves(self, edit: Bottleneck) -> bool:
        """Whether the kernel computes this one."""
        return self.kernel is not None and self.kernel.serves(self._like, edit.activation)

    def put(self, slot: int, edit: Bottleneck) -> None:
        """Keep an adapter's bottleneck."""
        form = _form_of(edit)
        if form not in self._forms:
            num_features = edit.down_BD.shape[1]
            self._forms[form] = _OfForm(form, self._squeezes(num_features), self._like.new_empty(num_features))
        self._forms[form].put(slot, edit)

    def drop(self, slot: int) -> None:
        """Forget the slot, if it has something here."""
        for each in self._forms.values():
            each.drop(slot)

    def clear(self) -> None:
        """Forget all of them."""
        for each in self._forms.values():
            for slot in list(each.slots):
                each.drop(slot)

    def parts(self, route: Route) -> tuple[LiftedPart, ...]:
        """The bottlenecks of the active slots, those of one form together."""
        parts = (each.part(route) for each in self._forms.values())
        return tuple(part for part in parts if part is not None)

    def _squeezes(self, num_features: int) -> Squeezes:
        """Of a form that nobody has any more, where there are many: there are more forms than the kernel's table is to
        have layers."""
        if len(self._forms) >= _MOST_FORMS:
            idle = next((form for form, each in self._forms.items() if not each.slots), None)
            if idle is not None:
                ended = self._forms.pop(idle)
                ended.end()
                return ended.squeezes
        assert self.kernel is not None, "there is a kernel that serves it"
        return self.kernel.layer(num_features, self._like.dtype)


def _form_of(edit: Bottleneck) -> _Form:
    return _Form(
        activation=edit.activation,
        reads=edit.reads,
        keeps=edit.keeps,
        norms_before=edit.norm_before is not None,
        norms_after=edit.norm_after is not None,
        norms_kept=edit.norms_kept,
        is_final=edit.is_final,
    )
