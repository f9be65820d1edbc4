"""Changes that are decided on what a record says, and decided again where another process changed it meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, TypeVar

from peft_serve.adapters.name_ledger import NameLedger
from peft_serve.adapters.names import is_name
from peft_serve.adapters.store_protocol import RecordMoved
from peft_serve.errors import Unavailable

T = TypeVar("T")

_MAX_TRIES: Final = 100  # each time somebody else's change of the same name took place
_RETRY_S: Final = 1.0


def look_again(names: NameLedger, *wanted: str) -> None:
    """Read these records again, of a shared store; raises AdapterUnavailable, before anything is changed."""
    for name in dict.fromkeys(wanted):
        if is_name(name):
            names.refresh(name)


def decided(decide: Callable[[], T]) -> T:
    """What `decide` gives or raises, which looks at records and writes what follows from them. It is asked anew for as
    long as a write finds that a record moved; raises Unavailable where that has no end. The write has read it again."""
    for _ in range(_MAX_TRIES):
        try:
            return decide()
        except RecordMoved as moved:
            name = moved.name
    raise Unavailable(f"'{name}' is changed by others all the time; try again", retry_after_s=_RETRY_S)
