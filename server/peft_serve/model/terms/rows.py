"""Exchanged rows of a site's table: an adapter's own embeddings of some ids, or its own rows of a head's weight."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from peft_serve.adapters.base import SiteSpec
from peft_serve.adapters.primitives import Affine, Edit
from peft_serve.model.routing import Route
from peft_serve.model.terms.term import OutOp


@dataclass(frozen=True, slots=True)
class _Own:
    """The rows of one adapter, ids ascending."""

    ids_N: Tensor
    values_ND: Tensor


class _RowsBySlot:
    """The rows of the installed adapters."""

    def __init__(self, like: Tensor) -> None:
        self._like = like
        self._own: dict[int, _Own] = {}

    def put(self, slot: int, edit: Edit) -> None:
        if isinstance(edit, Affine) and edit.rows is not None and len(edit.rows.ids_N):
            ids_N, order_N = torch.sort(edit.rows.ids_N)
            values_ND = edit.rows.values_ND[order_N].to(self._like)
            self._own[slot] = _Own(ids_N.to(self._like.device), values_ND)

    def drop(self, slot: int) -> None:
        self._own.pop(slot, None)


class LookupRows(_RowsBySlot):
    """At an embedding: a token whose id is among its adapter's gets the adapter's row.

    All adapters at once: (slot, id) pairs are numbers, which a sorted list is searched for.
    """

    def __init__(self, spec: SiteSpec, like: Tensor) -> None:
        super().__init__(like)
        self._num_ids = spec.in_features
        self._scale = spec.embed_scale

    def op(self, route: Route) -> OutOp | None:
        slots = sorted(route.active.intersection(self._own))
        if not slots:
            return None
        keys_N = torch.cat([self._own[slot].ids_N + slot * self._num_ids for slot in slots])
        values_ND = torch.cat([self._own[slot].values_ND for slot in slots])
        subset = route.subset(frozenset(slots))
        slot_N = route.slots_in(frozenset(slots))
        route.keeps(keys_N, values_ND)

        def exchange(y_TO: Tensor, ids_T: Tensor) -> None:
            wanted_N = subset.take(ids_T) + slot_N * self._num_ids
            at_N = torch.searchsorted(keys_N, wanted_N).clamp_(max=len(keys_N) - 1)
            is_own_N = keys_N[at_N] == wanted_N
            own_NO = values_ND.index_select(0, at_N)
            own_NO = own_NO if self._scale == 1.0 else own_NO * self._scale
            subset.put_(y_TO, torch.where(is_own_N[:, None], own_NO, subset.take(y_TO)))

        return exchange


class HeadRows(_RowsBySlot):
    """At a Linear or Conv1D: some of the outputs come from the adapter's own rows; the bias stays.

    Adapter by adapter: such a site is the head, one for the whole model, and its rows are few.
    """

    def __init__(self, module: nn.Module, like: Tensor) -> None:
        super().__init__(like)
        bias = getattr(module, "bias", None)
        self._bias_O: Tensor | None = None if bias is None else bias.detach()

    def op(self, route: Route) -> OutOp | None:
        parts = [(one.tokens, self._own[one.slot]) for one in route.personal(self._own)]
        if not parts:
            return None
        bias_O = self._bias_O

        def exchange(y_TO: Tensor, x_TI: Tensor) -> None:
            for tokens, own in parts:
                out_TN = tokens.take(x_TI) @ own.values_ND.t()
                out_TN = out_TN if bias_O is None else out_TN + bias_O[own.ids_N]
                tokens.put_columns_(y_TO, own.ids_N, out_TN)

        return exchange
