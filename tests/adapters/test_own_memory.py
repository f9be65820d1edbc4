"""Memory of its own: as much as was asked for, written and read as any other, and given back with its last view."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from peft_serve.adapters.own_memory import own_memory


@pytest.mark.parametrize("num_numbers", [0, 1, 1000, 1 << 18])
def test_it_holds_what_is_written(num_numbers: int) -> None:
    memory = own_memory(num_numbers, torch.bfloat16)
    memory.fill_(3)
    assert (memory.shape, memory.dtype) == ((num_numbers,), torch.bfloat16)
    assert memory.untyped_storage().nbytes() == 2 * num_numbers
    assert bool((memory == 3).all())


GIVEN_BACK = """
import gc, resource
import torch
from peft_serve.adapters.own_memory import own_memory
from peft_serve.commands.allocator import giving_back

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() >> 20

with giving_back():  # behind it the allocator keeps pieces of these sizes in its heaps, as a server's does
    pass
print(resident())
pieces = [own_memory(16 << 20, torch.uint8).fill_(1) for _ in range(4)]
view, held = pieces[0][1 << 20 :], torch.zeros(1 << 20, dtype=torch.uint8)  # what stays on top of a heap
print(resident())
del pieces
gc.collect()
assert int(view[-1]) == 1, "a view keeps its piece"
print(resident())
del view
gc.collect()
print(resident())
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="only Linux says how much memory a process has")
def test_it_goes_back_to_the_system_with_its_last_view() -> None:
    ran = subprocess.run([sys.executable, "-c", GIVEN_BACK], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    before, filled, viewed, behind = map(int, ran.stdout.split())
    assert filled - before > 60
    assert 12 < viewed - before < 24, "one piece of four is left"
    assert behind - before < 8


def test_more_than_there_is_says_so() -> None:
    with pytest.raises(MemoryError, match="bytes of memory"):
        own_memory(1 << 60, torch.uint8)
