"""Residents: the adapters that are in slots, put there and taken out again.

An adapter that cannot be put into its slot leaves it empty, whatever the reason. Where memory runs out, the allocator
gives back what it keeps and nobody uses, and there is one more try. Plans nothing: slots and blocks are named by the
`Step`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from peft_serve.adapters.frames import without_frames
from peft_serve.adapters.primitives import Adapter
from peft_serve.adapters.shortage import is_short_of_memory
from peft_serve.core import AdapterId, Install
from peft_serve.errors import ServeError
from peft_serve.model.base import ResidentBase
from peft_serve.model.carrier import Carrier
from peft_serve.model.heads import Heads
from peft_serve.model.prefixes import VirtualTokens

_log = logging.getLogger(__name__)


class Residents:
    """See the module. With a `carrier` adapters lie among the KV blocks and are brought there while passes run."""

    def __init__(
        self,
        base: ResidentBase,
        adapters: Callable[[AdapterId], Adapter],
        virtual: VirtualTokens,
        heads: Heads,
        *,
        carrier: Carrier | None = None,
        free: Callable[[], None] = lambda: None,
    ) -> None:
        """`adapters` gives the compiled adapter of an `Install` and may raise; `free` is the allocator's."""
        self._base = base
        self._adapters = adapters
        self._virtual = virtual
        self._heads = heads
        self._carrier = carrier
        self._free = free
        self._occupied: set[int] = set()
        self.was_short_of_memory = False  # in an install, since somebody said it was not

    def remove(self, slot: int) -> None:
        """Empty a slot. One that a failed install left empty may be named: its plan did not know yet."""
        if slot in self._occupied:
            self._occupied.remove(slot)
            self._base.adapted.remove(slot)
            self._virtual.remove(slot)
            self._heads.drop(slot)
        if self._carrier is not None:
            self._carrier.leave(slot)

    def settle(self) -> None:
        """A step has run. What it did not wait for, the next one need not think of."""
        if self._carrier is not None:
            self._carrier.settle()

    def install(self, install: Install) -> str | None:
        """Put an adapter into its slot; the reason if that fails, and then the slot is empty."""
        error = self._attempt(install)
        if error is not None and is_short_of_memory(error):
            self.was_short_of_memory = True
            self._free()
            error = self._attempt(install)
        return None if error is None else _told(error)

    def _attempt(self, install: Install) -> Exception | None:
        try:
            self._put(install)
        except Exception as error:  # noqa: BLE001  # whatever is wrong with an adapter, the others run
            _log.warning("adapter %s cannot be installed", install.adapter, exc_info=True)
            self.remove(install.slot)
            return without_frames(error)
        return None

    def _put(self, install: Install) -> None:
        adapter = self._adapters(install.adapter)
        carried = None
        if self._carrier is not None:
            carried = self._carrier.carry(install.slot, adapter, install.pages)
            carried.wait(0)
        self._base.adapted.install(install.slot, adapter, carried)
        self._occupied.add(install.slot)
        self._virtual.place(install, adapter)
        head = adapter.head if carried is None else carried.adapter.head
        if head is not None:
            self._heads.put(install.slot, head)


def _told(error: Exception) -> str:
    if is_short_of_memory(error):
        return "memory ran out; try again later"
    return str(error) if isinstance(error, ServeError | ValueError | LookupError) else type(error).__name__
