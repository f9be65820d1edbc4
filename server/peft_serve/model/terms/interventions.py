"""Interventions: low-rank edits of the hidden states at some positions of a sequence (ReFT, arXiv:2404.03592).

x + P^T (act(W x + b) - P x), or without the last term. Edits of one form at equally many positions share three
batched products.

Shapes: `G` edits of one form, `P` positions of each, `R` rank, `D` features of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from peft_serve.adapters.sublayer_primitives import Intervention, SubspaceEdit
from peft_serve.model.extents import Extents, Moves
from peft_serve.model.routing import Route
from peft_serve.model.terms.bottlenecks import activation_of

_Form = tuple[int, str | None, bool, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class InterventionPart:
    """Edits of one form at equally many positions each."""

    sources: Tensor  # [G P] places in the stream
    targets: Tensor
    source_GDR: Tensor
    source_bias_G1R: Tensor
    projection_GRD: Tensor
    activation: Callable[[Tensor], Tensor] | None
    subtracts: bool

    def of(self, x_TD: Tensor) -> Tensor:
        """What comes to stand at the targets, [G P, D]."""
        num_edits, num_features = len(self.projection_GRD), x_TD.shape[-1]
        x_GPD = x_TD.index_select(0, self.sources).view(num_edits, -1, num_features)
        low_GPR = torch.baddbmm(self.source_bias_G1R, x_GPD, self.source_GDR)
        if self.activation is not None:
            low_GPR = self.activation(low_GPR)
        if self.subtracts:
            low_GPR = low_GPR - torch.bmm(x_GPD, self.projection_GRD.transpose(1, 2))
        return torch.baddbmm(x_GPD, low_GPR, self.projection_GRD).flatten(0, 1)


def parts_of(edits: Mapping[int, Intervention], route: Route) -> tuple[InterventionPart, ...]:
    """What the active slots edit, edits of one form at equally many positions stacked."""
    by_form: dict[_Form, list[tuple[SubspaceEdit, Moves]]] = {}
    for slot in sorted(route.extents.slots.intersection(edits)):
        edit = edits[slot]
        each = route.extents.moves(slot, edit.num_first, edit.num_last)
        for unit, moves in zip((edit.first, edit.last), each, strict=True):
            if moves.targets:
                form = (unit.source_RD.shape[0], edit.activation, edit.subtracts, len(moves.targets))
                by_form.setdefault(form, []).append((unit, moves))
    return tuple(_stacked(form, members, route.extents) for form, members in by_form.items())


def _stacked(form: _Form, members: Sequence[tuple[SubspaceEdit, Moves]], extents: Extents) -> InterventionPart:
    _, activation, subtracts, _ = form
    units = [unit for unit, _ in members]
    return InterventionPart(
        sources=extents.index(tuple(place for _, moves in members for place in moves.sources)),
        targets=extents.index(tuple(place for _, moves in members for place in moves.targets)),
        source_GDR=torch.stack([unit.source_RD for unit in units]).transpose(1, 2),
        source_bias_G1R=torch.stack([unit.source_bias_R for unit in units])[:, None],
        projection_GRD=torch.stack([unit.projection_RD for unit in units]),
        activation=None if activation is None else activation_of(activation),
        subtracts=subtracts,
    )
