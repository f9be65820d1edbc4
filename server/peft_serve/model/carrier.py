"""The carrier: brings adapters to their blocks on the device, layer by layer, and says when each layer's have come.

It asks for all copies at once and waits for none. A slot's adapter may be installed at once: what is read while it is
installed has the device wait for it then, and a layer's low-rank factors only when a pass comes to that layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from torch import Tensor

from peft_serve.adapters.primitives import Adapter
from peft_serve.model.arena import Arena
from peft_serve.model.layout import ALIGNMENT, Layout, Part, lay_out, placed, tensors_beside
from peft_serve.model.wire import Mark, Wire


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Carried:
    """An adapter whose tensors lie on the device, or will: `wait(stage)` has the device wait for those of a stage."""

    adapter: Adapter
    stages: Mapping[str, int]  # by site path
    wait: Callable[[int], None]


class Carrier:
    """For one arena and one base. One thread carries; `layout` may be asked for on any."""

    def __init__(self, arena: Arena, wire: Wire, *, order: Sequence[str]) -> None:
        """`order` has the base's sites as a pass goes through them."""
        self.arena = arena
        self._wire = wire
        self._order = tuple(order)
        self._layouts: WeakKeyDictionary[Adapter, Layout] = WeakKeyDictionary()
        self._last: dict[int, Mark] = {}  # by slot, of those that were not waited for

    def layout(self, adapter: Adapter) -> Layout:
        """Where the adapter's tensors lie in its blocks."""
        found = self._layouts.get(adapter)
        if found is None:
            found = self._layouts[adapter] = lay_out(adapter, self._order, self.arena.block_bytes)
        return found

    def room_for(self, adapter: Adapter) -> tuple[tuple[int, ...], int]:
        """The runs of blocks that the adapter fills, and the bytes that it has on the device, in blocks and beside."""
        layout = self.layout(adapter)
        beside = sum(tensor.nbytes for tensor in tensors_beside(adapter, layout))
        return layout.runs, sum(layout.runs) * self.arena.block_bytes + beside

    def carry(self, slot: int, adapter: Adapter, pages: Sequence[int]) -> Carried:
        """Begin to bring an adapter into the runs of blocks that begin at `pages`."""
        layout = self.layout(adapter)
        runs = [self.arena.stretch(first, length) for first, length in zip(pages, layout.runs, strict=True)]
        targets = {part.key: _target(part, runs[part.run]) for part in layout.parts}
        self._wire.begin()
        marks: list[Mark] = []  # behind each stage
        try:
            for part in layout.parts:
                while len(marks) < part.stage:
                    marks.append(self._wire.mark())
                self._wire.copy(targets[part.key], part.source.t() if part.is_turned else part.source)
        finally:
            marks.append(self._wire.mark())
            self._last[slot] = marks[-1]

        def place(tensor: Tensor, is_turned: bool) -> Tensor:
            target = targets.get((id(tensor), is_turned))
            if target is None:
                return tensor
            return target.t() if is_turned else target

        return Carried(
            adapter=placed(adapter, place),
            stages=layout.stages,
            wait=lambda stage: self._wire.wait(marks[min(stage, len(marks) - 1)]),
        )

    def leave(self, slot: int) -> None:
        """The slot is empty, and its blocks may be given away: what is still on the way there comes before that."""
        mark = self._last.pop(slot, None)
        if mark is not None:
            self._wire.wait(mark)

    def settle(self) -> None:
        """Have the device wait for all that is on the way: what comes next, a captured step say, need not ask."""
        for slot in tuple(self._last):
            self.leave(slot)


def _target(part: Part, run: Tensor) -> Tensor:
    source = part.source.t() if part.is_turned else part.source
    first = -run.storage_offset() % ALIGNMENT + part.offset
    return run[first : first + source.nbytes].view(source.dtype).view(source.shape)
