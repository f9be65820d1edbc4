"""Mixers: block-diagonal maps of what goes into a site or comes out of it, and features mixed in pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from peft_serve.adapters.primitives import Affine, BlockDiagonal, Edit, Paired
from peft_serve.kernels.block_diagonal import LayerBlocks
from peft_serve.kernels.mixing import Blocks, Mix, MixingKernels, mixed_by_blocks, mixed_in_pairs
from peft_serve.kernels.slot_numbers import SlotFactors
from peft_serve.kernels.subsets import Batch, Tokens
from peft_serve.model.routing import Route
from peft_serve.model.terms.tables import SlotTable, TruthTable
from peft_serve.model.terms.term import InOp, OtherKernels, OutOp

_BlockPart = tuple[Batch, Tensor]
"""Runs of one length, and their blocks [G, n, k, k]."""


class _Blocks:
    """The blocks of the installed adapters.

    With a kernel they are read where they lie. Else, for a route, adapters with blocks of one shape and runs of one
    length are stacked, for one batched product: a copy of their blocks that lives as long as the route. A single run
    reads its own.
    """

    def __init__(self, like: Tensor) -> None:
        self._like = like
        self._blocks: dict[int, Tensor] = {}
        self._kernel: MixingKernels | None = None
        self._direct: Blocks | None = None  # made for the first adapter
        self._slots: set[int] = set()  # of the kernel

    def use_others(self, kernels: OtherKernels) -> None:
        """Run by a kernel from now on, where it can. No adapter is here yet."""
        assert not self._blocks, "the choice is made before adapters are installed"
        if kernels.mixing.serves(self._like):
            self._kernel = kernels.mixing

    def keep(self, slot: int, mixer: object) -> None:
        if not isinstance(mixer, BlockDiagonal):
            return
        if self._kernel is None:
            self._blocks[slot] = mixer.blocks_NKK.to(self._like)
            return
        if self._direct is None:
            num_blocks, size = mixer.blocks_NKK.shape[:2]
            self._direct = self._kernel.layer(num_blocks * size, self._like.dtype)
        self._direct.put(slot, mixer.blocks_NKK)
        self._slots.add(slot)

    def drop(self, slot: int) -> None:
        self._blocks.pop(slot, None)
        if self._direct is not None:
            self._direct.drop(slot)
            self._slots.discard(slot)

    def mix(self, route: Route) -> Mix | None:
        """What the active adapters do, from x to y, where some of them mix."""
        if self._direct is not None:
            return None if self._slots.isdisjoint(route.active) else self._direct.op(route.segments)
        parts = self.parts(route)
        return (lambda y_TD, x_TD: _mix_(y_TD, x_TD, parts)) if parts else None

    def by_slot(self, route: Route) -> SlotFactors | None:
        """The blocks as a layer's kernel reads them for the adapters of a route, if it can read them."""
        return self._direct.by_slot(route.segments) if isinstance(self._direct, LayerBlocks) else None

    def parts(self, route: Route) -> list[_BlockPart]:
        by_shape: dict[torch.Size, set[int]] = {}
        for slot in route.active.intersection(self._blocks):
            by_shape.setdefault(self._blocks[slot].shape, set()).add(slot)
        parts: list[_BlockPart] = []
        for slots in map(frozenset, by_shape.values()):
            parts.extend(
                (alike.batch, _stacked([self._blocks[slot] for slot in alike.slots])) for alike in route.batches(slots)
            )
        return parts


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0][None] if len(tensors) == 1 else torch.stack(tuple(tensors))


def _mix_(y_TD: Tensor, x_TD: Tensor, parts: Sequence[_BlockPart]) -> None:
    for batch, blocks_GNKK in parts:
        batch.subset.put_(y_TD, mixed_by_blocks(batch.take(x_TD), blocks_GNKK).flatten(0, 1))


class InMix(_Blocks):
    """x -> x R, R block-diagonal."""

    def put(self, slot: int, edit: Edit) -> None:
        if isinstance(edit, Affine):
            self.keep(slot, edit.in_mix)

    def op(self, route: Route) -> InOp | None:
        mix = self.mix(route)
        if mix is None:
            return None

        def mixed(x_TI: Tensor) -> Tensor:
            own_TI = x_TI.clone()
            mix(own_TI, x_TI)
            return own_TI

        return mixed


class OutMix(_Blocks):
    """y -> y R, R block-diagonal."""

    def put(self, slot: int, edit: Edit) -> None:
        if isinstance(edit, Affine):
            self.keep(slot, edit.out_mix)

    def op(self, route: Route) -> OutOp | None:
        parts = () if self._direct is not None else self.parts(route)
        if parts:  # each is read whole before it is written
            return lambda y_TO, _: _mix_(y_TO, y_TO, parts)
        mix = self.mix(route)
        return None if mix is None else (lambda y_TO, _: mix(y_TO, y_TO.clone()))


@dataclass(frozen=True, slots=True)
class _Pairs:
    """The adapters with one group size."""

    having: TruthTable
    own: SlotTable
    other: SlotTable

    def tables(self) -> tuple[SlotTable, ...]:
        return self.having, self.own, self.other


@dataclass(frozen=True, slots=True)
class _PairPart:
    """Some tokens, their slots, and the tables to read for them."""

    subset: Tokens
    slot_N: Tensor
    own_SO: Tensor
    other_SO: Tensor
    group: int


class OutPairs:
    """y -> own * y + other * y', y' being y with the halves of each group exchanged: all adapters at once."""

    def __init__(self, like_O: Tensor) -> None:
        self._like_O = like_O
        self._by_group: dict[int, _Pairs] = {}

    def put(self, slot: int, edit: Edit) -> None:
        if not isinstance(edit, Affine) or not isinstance(edit.out_mix, Paired):
            return
        group = edit.out_mix.group
        if group not in self._by_group:
            own, other = (SlotTable(self._like_O.new_zeros(len(self._like_O))) for _ in range(2))
            self._by_group[group] = _Pairs(TruthTable(self._like_O.device), own, other)
        self._by_group[group].own.put(slot, edit.out_mix.own_O)
        self._by_group[group].other.put(slot, edit.out_mix.other_O)
        self._by_group[group].having.add(slot)

    def drop(self, slot: int) -> None:
        for group, pairs in list(self._by_group.items()):
            for table in pairs.tables():
                table.drop(slot)
            if not pairs.own.slots:
                del self._by_group[group]
                for table in pairs.tables():
                    table.end()

    def op(self, route: Route) -> OutOp | None:
        parts: list[_PairPart] = []
        for group, pairs in self._by_group.items():
            tokens = pairs.having.tokens(route)
            if tokens is not None:
                pairs.own.index(route)
                pairs.other.index(route)
                parts.append(_PairPart(*tokens, pairs.own.rows, pairs.other.rows, group))
        if not parts:
            return None

        def mix(y_TO: Tensor, _: Tensor) -> None:
            for part in parts:
                own_NO, other_NO = (t.index_select(0, part.slot_N) for t in (part.own_SO, part.other_SO))
                y_NO = part.subset.take(y_TO)
                part.subset.put_(y_TO, mixed_in_pairs(y_NO, own_NO, other_NO, part.group))

        return mix
