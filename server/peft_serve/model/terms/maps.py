"""Linear maps beside the low-rank one, adapter by adapter: dense, Kronecker, sparse, and those by transforms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import embedding

from peft_serve.adapters.base import SiteKind, SiteSpec
from peft_serve.adapters.primitives import Affine, Dense, Edit, Kronecker, LinearMap, Sparse
from peft_serve.adapters.shared_primitives import SharedMap
from peft_serve.adapters.transform_primitives import Circulant, Spectrum
from peft_serve.kernels import maps, transforms
from peft_serve.model.routing import Route
from peft_serve.model.terms.term import OutOp

AddMap = Callable[[Tensor, Tensor], object]
"""(y [T, O] of one adapter's tokens, their x) -> y changed in place."""


class Maps:
    """y -> y + sum_k D_k x. Those with factors that many adapters share are terms of their own."""

    def __init__(self, spec: SiteSpec, like: Tensor) -> None:
        self._spec = spec
        self._like = like
        self._maps: dict[int, tuple[AddMap, ...]] = {}

    def put(self, slot: int, edit: Edit) -> None:
        if isinstance(edit, Affine):
            own = tuple(self._on_device(one) for one in edit.maps if not isinstance(one, SharedMap))
            if own:
                self._maps[slot] = own

    def drop(self, slot: int) -> None:
        self._maps.pop(slot, None)

    def op(self, route: Route) -> OutOp | None:
        parts = [(one.tokens, self._maps[one.slot]) for one in route.personal(self._maps)]
        if not parts:
            return None

        def add(y_TO: Tensor, x_T: Tensor) -> None:
            for tokens, own in parts:
                tokens.change_(y_TO, partial(_add_all_, tokens.take(x_T), own))

        return add

    def _on_device(self, linear_map: LinearMap) -> AddMap:
        is_lookup = self._spec.kind is SiteKind.EMBEDDING
        if isinstance(linear_map, Dense):
            return _dense(linear_map, self._like, is_lookup=is_lookup)
        if isinstance(linear_map, Kronecker):
            return _kronecker(linear_map, self._like, is_lookup=is_lookup)
        if isinstance(linear_map, Circulant):
            return _circulant(linear_map, self._like)
        if isinstance(linear_map, Spectrum):
            return self._spectrum(linear_map)
        assert isinstance(linear_map, Sparse), "the install was checked"
        return self._sparse(linear_map, is_lookup=is_lookup)

    def _sparse(self, given: Sparse, *, is_lookup: bool) -> AddMap:
        device = self._like.device
        out_N, in_N = given.out_N.to(device), given.in_N.to(device)
        values_N = given.values_N.to(self._like)
        if is_lookup:
            columns = maps.compressed(in_N, out_N, values_N, num_rows=self._spec.in_features)
            most = maps.most_in_a_row(columns)
            return lambda y_TO, ids_T: maps.add_sparse_lookup_(y_TO, ids_T, columns, most=most)
        rows = maps.compressed(out_N, in_N, values_N, num_rows=self._spec.out_features)
        return lambda y_TO, x_TI: maps.add_sparse_(y_TO, x_TI, rows)

    def _spectrum(self, given: Spectrum) -> AddMap:
        out_N, in_N = given.out_N.to(self._like.device), given.in_N.to(self._like.device)
        values_N = given.values_N.to(self._like.device, torch.float32)
        rows = maps.compressed(out_N, in_N, values_N, num_rows=self._spec.out_features)
        return lambda y_TO, x_TI: transforms.add_spectrum_(y_TO, x_TI, rows)


def _add_all_(x_T: Tensor, own: Sequence[AddMap], y_TO: Tensor) -> None:
    for add_map in own:
        add_map(y_TO, x_T)


def _circulant(given: Circulant, like: Tensor) -> AddMap:
    spectrum_FNM = transforms.circulant_spectrum(given.kernel_MNB.to(like.device))
    side = given.kernel_MNB.shape[2]
    return lambda y_TO, x_TI: transforms.add_circulant_(y_TO, x_TI, spectrum_FNM, side)


def _dense(given: Dense, like: Tensor, *, is_lookup: bool) -> AddMap:
    weight_OI = given.weight_OI.to(like)
    if is_lookup:
        table_VO = weight_OI.t().contiguous()
        return lambda y_TO, ids_T: y_TO.add_(embedding(ids_T, table_VO))
    return lambda y_TO, x_TI: y_TO.addmm_(x_TI, weight_OI.t())


def _kronecker(given: Kronecker, like: Tensor, *, is_lookup: bool) -> AddMap:
    left, right = given.left.to(like), given.right.to(like)
    if is_lookup:
        return lambda y_TO, ids_T: maps.add_kronecker_lookup_(y_TO, ids_T, left, right)
    return lambda y_TO, x_TI: maps.add_kronecker_(y_TO, x_TI, left, right)
