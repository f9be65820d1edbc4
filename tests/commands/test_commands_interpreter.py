"""What a server sets in its process, seen in a process of its own."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import gc, sys
from peft_serve.commands.interpreter import SWITCH_S, YOUNG_OBJECTS, settle_interpreter
settle_interpreter()
assert abs(sys.getswitchinterval() - SWITCH_S) < 1e-9
assert gc.isenabled() and gc.get_threshold()[0] == YOUNG_OBJECTS
num_frozen, num_looked_at = gc.get_freeze_count(), len(gc.get_objects())
assert num_frozen > 10 * num_looked_at, (num_frozen, num_looked_at)
"""


def test_what_stays_is_left_out_of_collections_and_threads_take_short_turns() -> None:
    subprocess.run([sys.executable, "-c", PROGRAM], check=True)
