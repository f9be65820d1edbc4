"""The interpreter of a server's process: how its threads take turns, and what its garbage collector looks at.

Process-wide settings, made once by whoever owns the process: the floors below know nothing of them.
"""

from __future__ import annotations

import gc
import sys
from typing import Final

SWITCH_S: Final = 0.0005
"""How long a thread computes in Python while another one waits for its turn. With Python's own 5 ms the event loop,
which gives its turn away with every write to a socket, may wait 5 ms for each of them while the engine plans a step,
and the engine as long behind every one of a step's tensor operations while an adapter is being read."""

YOUNG_OBJECTS: Final = 5_000
"""New objects that begin a collection of the young ones; Python's own 700 are reached by the events of one step."""


def settle_interpreter() -> None:
    """Call this when everything that stays has been loaded, and before threads do anything that counts.

    Half a million objects (modules, the base) live as long as the process: a full collection that looked at all of
    them would stop every thread for some tenths of a second.
    """
    sys.setswitchinterval(SWITCH_S)
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG_OBJECTS, 10, 10)
