"""Memory that a start frees is given back to the system."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

FREED = """
import ctypes, sys
from peft_serve.commands.allocator import giving_back
library = ctypes.CDLL(None)
if not hasattr(library, "malloc_trim"):
    sys.exit(77)
library.malloc.restype = ctypes.c_void_p
library.free.argtypes = [ctypes.c_void_p]

def kept():  # MiB in memory of 64 that were taken in pieces of one and freed, every second one first
    def now():
        return int(open("/proc/self/statm").read().split()[1]) >> 8
    before, pieces = now(), []
    for _ in range(64):
        pieces.append(library.malloc(1 << 20))
        ctypes.memset(pieces[-1], 1, 1 << 20)
    assert now() - before > 60
    library.malloc(1 << 20)  # stays on top of the heap: nothing below it can be cut off
    for piece in pieces[::2] + pieces[1::2]:
        library.free(piece)
    return now() - before

library.free(library.malloc(8 << 20))  # as glibc is, it takes what is smaller from its heap from now on
with giving_back():
    print(kept())
print(kept())
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="only Linux says how much memory a process has")
def test_what_is_freed_within_is_given_back() -> None:
    ran = subprocess.run([sys.executable, "-c", FREED], capture_output=True, text=True, check=False)
    if ran.returncode == 77:
        pytest.skip("not glibc")
    assert ran.returncode == 0, ran.stderr
    within, behind = map(int, ran.stdout.split())
    assert within < 5
    assert behind > 50, "a step finds again what the one before it has freed"
