"""The outbox: events on their way from the engine to those who asked, always in the order in which they came about.

The events of a step may be held until the next one is under way: telling them wakes other threads, and where a device
computes on its own that is better done while it does. Whatever else is told goes behind what is held. Used on the
engine's thread alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from peft_serve.core import Event


class Outbox:
    """See the module. Nothing is held unless `hold` was called."""

    def __init__(self) -> None:
        self._deliver: Callable[[Sequence[Event]], None] = lambda _events: None
        self._held: tuple[Event, ...] = ()
        self._fault: Exception | None = None

    def connect(self, deliver: Callable[[Sequence[Event]], None]) -> None:
        """Where events go."""
        self._deliver = deliver

    def hold(self, events: Sequence[Event]) -> None:
        """Tell these with the next call of anything else here."""
        self.tell()
        self._held = tuple(events)

    def tell(self, events: Sequence[Event] = ()) -> None:
        """Tell what is held, and then these."""
        told, self._held = (*self._held, *events), ()
        if told:
            self._deliver(told)

    def tell_within_a_step(self) -> None:
        """Tell what is held. A fault is kept for `require_told`: within a step it would be taken for a row's."""
        try:
            self.tell()
        except Exception as error:  # noqa: BLE001  # raised where it belongs
            self._fault = error

    def require_told(self) -> None:
        """Raise what a call of `tell_within_a_step` did not."""
        fault, self._fault = self._fault, None
        if fault is not None:
            raise fault
