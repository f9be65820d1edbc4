"""The layout of an adapter on the device: which of its tensors lie in blocks of the arena, where, and who comes first.

Tensors lie one behind the other; one that is larger than a block has neighbouring blocks of its own, and small ones
share what is left. Nothing is padded to the largest rank. Low-rank factors come last, layer by layer, so that a pass
may begin before its last layer's have come.

In blocks are low-rank factors, matrices, exchanged rows, and parameters in place of the base's. Not in blocks: what
many adapters share, which is on the device once for all of them; what becomes something else there (vectors in tables,
mixers and bottlenecks in slabs, spectra); and what stands in front of a sequence.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from torch import Tensor

from peft_serve.adapters.primitives import Adapter, Affine, Dense, Edit, Head, Kronecker, LowRank, Replace, mapped

ALIGNMENT: Final = 128
"""Bytes: a tensor begins where a line of the device's cache does."""

_LAYER: Final = re.compile(r"^.*?\.\d+\.")  # of a site's path: up to the number of its layer

Place = Callable[[Tensor, bool], Tensor]
"""(a tensor, whether it is to lie turned) -> where it is on the device, in the shape that it has."""


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """A tensor, and where it lies: in which run, and how many bytes behind the run's beginning."""

    source: Tensor  # on the host; [O, R] where it lies turned
    is_turned: bool
    stage: int  # when it comes
    run: int = 0
    offset: int = 0

    @property
    def key(self) -> tuple[int, bool]:
        return id(self.source), self.is_turned


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Layout:
    """`parts` in the order in which they come, `runs` in blocks, and the stage that a site's factors come with."""

    parts: tuple[Part, ...]
    runs: tuple[int, ...]
    stages: Mapping[str, int]


def lay_out(adapter: Adapter, order: Sequence[str], block_bytes: int) -> Layout:
    """The layout of an adapter in blocks of so many bytes. `order` has the base's sites as a pass goes through them."""
    at = {path: number for number, path in enumerate(order)}
    paths = sorted(adapter.sites, key=lambda path: at.get(path, len(at)))
    stages = _stages(paths)
    wanted: dict[tuple[int, bool], Part] = {}

    def note(stage: int) -> Place:
        def noted(tensor: Tensor, is_turned: bool) -> Tensor:
            part = Part(tensor, is_turned, stage)
            if tensor.numel() and part.key not in wanted:
                wanted[part.key] = part
            return tensor

        return noted

    for path in paths:
        _edit_placed(adapter.sites[path], note(0), note(stages[path]))
    if adapter.head is not None:
        _head_placed(adapter.head, note(0))
    parts, runs = _packed(sorted(wanted.values(), key=lambda part: part.stage), block_bytes)
    return Layout(parts=parts, runs=runs, stages=stages)


def placed(adapter: Adapter, place: Place) -> Adapter:
    """The adapter with the tensors that lie in blocks where `place` has them."""
    sites = {path: _edit_placed(edit, place, place) for path, edit in adapter.sites.items()}
    head = None if adapter.head is None else _head_placed(adapter.head, place)
    return replace(adapter, sites=sites, head=head)


def _stages(paths: Sequence[str]) -> dict[str, int]:
    """From 1 on, one for all sites of a layer and for all those between two layers."""
    stages: dict[str, int] = {}
    number, last = 0, None
    for path in paths:
        found = _LAYER.match(path)
        layer = found.group() if found else ""
        number, last = number + (layer != last), layer
        stages[path] = number
    return stages


def _edit_placed(edit: Edit, place: Place, place_factors: Place) -> Edit:
    if isinstance(edit, Replace):
        return mapped(edit, lambda tensor: place(tensor, False))
    if not isinstance(edit, Affine):
        return edit
    rows, delta = edit.rows, edit.delta
    if rows is not None:
        rows = mapped(rows, lambda tensor: place(tensor, False))
    if delta is not None:
        delta = LowRank(place_factors(delta.a_RI, False), place_factors(delta.b_OR, True))
    maps = tuple(
        mapped(one, lambda tensor: place(tensor, False)) if isinstance(one, Dense | Kronecker) else one
        for one in edit.maps
    )
    return replace(edit, rows=rows, delta=delta, maps=maps)


def _head_placed(head: Head, place: Place) -> Head:
    return mapped(head, lambda tensor: place(tensor, False))


def _packed(parts: Sequence[Part], block_bytes: int) -> tuple[tuple[Part, ...], tuple[int, ...]]:
    """Where each part lies: the large ones in runs of their own, every other in the first run with room for it."""
    slack = ALIGNMENT if block_bytes % ALIGNMENT else 0  # a run may then begin anywhere
    runs: list[int] = []
    used: list[int] = []
    found: dict[tuple[int, bool], Part] = {}
    for part in sorted(parts, key=lambda one: -one.source.nbytes):
        num_bytes = aligned(part.source.nbytes)
        room = (i for i, run in enumerate(runs) if used[i] + num_bytes <= run * block_bytes)
        place = next(room, len(runs))
        if place == len(runs):
            runs.append(-(-(num_bytes + slack) // block_bytes))
            used.append(slack)
        found[part.key] = replace(part, run=place, offset=used[place] - slack)
        used[place] += num_bytes
    return tuple(found[part.key] for part in parts), tuple(runs)


def aligned(num_bytes: int) -> int:
    """So many bytes, up to where the next tensor may begin."""
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def tensors_beside(adapter: Adapter, layout: Layout) -> Iterator[Tensor]:
    """Tensors of the adapter that are in no block."""
    inside = {id(part.source) for part in layout.parts}
    return (tensor for tensor in adapter.tensors() if id(tensor) not in inside)
