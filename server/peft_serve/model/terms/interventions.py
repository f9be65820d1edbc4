"""Interventions: low-rank edits of the hidden states at some positions of a sequence (ReFT, arXiv:2404.03592).

x + P^T (act(W x + b) - P x), or without the last term. Edits of one form at equally many positions share three
batched products. In a step that is captured all tokens were generated, and each is a sequence of its own.

Shapes: `G` edits of one form, `P` positions of each, `R` rank, `D` features of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from peft_serve.adapters.sublayer_primitives import Intervention, SubspaceEdit
from peft_serve.kernels.subsets import Subset, Tokens
from peft_serve.model.extents import Moves, Unit, unit_of_generated
from peft_serve.model.routing import Route
from peft_serve.model.terms.bottlenecks import activation_of, stack

_Form = tuple[int, str | None, bool, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class InterventionPart:
    """Edits of one form at equally many positions each."""

    sources: Tokens  # G P of them
    targets: Tokens
    source_GDR: Tensor
    source_bias_G1R: Tensor
    projection_GRD: Tensor
    activation: Callable[[Tensor], Tensor] | None
    subtracts: bool

    def of(self, x_TD: Tensor) -> Tensor:
        """What the targets are to be, [G P, D]."""
        num_edits, num_features = len(self.projection_GRD), x_TD.shape[-1]
        x_GPD = self.sources.take(x_TD).view(num_edits, -1, num_features)
        low_GPR = torch.baddbmm(self.source_bias_G1R, x_GPD, self.source_GDR)
        if self.activation is not None:
            low_GPR = self.activation(low_GPR)
        if self.subtracts:
            low_GPR = low_GPR - torch.bmm(x_GPD, self.projection_GRD.transpose(1, 2))
        return torch.baddbmm(x_GPD, low_GPR, self.projection_GRD).flatten(0, 1)


def parts_of(edits: Mapping[int, Intervention], route: Route) -> tuple[InterventionPart, ...]:
    """What the active slots edit, edits of one form at equally many positions stacked."""
    parts: list[InterventionPart] = []
    for one in route.generated(edits):
        edit = edits[one.slot]
        which = unit_of_generated(edit.num_first, edit.num_last)
        if which is not None:
            unit = edit.last if which is Unit.LAST else edit.first
            parts.append(_part([unit], edit.activation, one.tokens, one.tokens, subtracts=edit.subtracts))
    by_form: dict[_Form, list[tuple[SubspaceEdit, Moves]]] = {}
    for slot in sorted(route.extents.slots.intersection(edits)):
        edit = edits[slot]
        each = route.extents.moves(slot, edit.num_first, edit.num_last)
        for unit, moves in zip((edit.first, edit.last), each, strict=True):
            if moves.targets:
                form = (unit.source_RD.shape[0], edit.activation, edit.subtracts, len(moves.targets))
                by_form.setdefault(form, []).append((unit, moves))
    for (_, activation, subtracts, _), members in by_form.items():
        sources, targets = (
            Subset(0, 0, route.extents.index(tuple(place for moves in each for place in moves)))
            for each in ([moves.sources for _, moves in members], [moves.targets for _, moves in members])
        )
        units = [unit for unit, _ in members]
        parts.append(_part(units, activation, sources, targets, subtracts=subtracts))
    return tuple(parts)


def _part(
    units: Sequence[SubspaceEdit], activation: str | None, sources: Tokens, targets: Tokens, *, subtracts: bool
) -> InterventionPart:
    return InterventionPart(
        sources=sources,
        targets=targets,
        source_GDR=stack([unit.source_RD for unit in units]).transpose(1, 2),
        source_bias_G1R=stack([unit.source_bias_R for unit in units])[:, None],
        projection_GRD=stack([unit.projection_RD for unit in units]),
        activation=None if activation is None else activation_of(activation),
        subtracts=subtracts,
    )
