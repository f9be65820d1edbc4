"""Memory of its own: as much as was asked for, written and read as any other, and given back with its last view."""

from __future__ import annotations

import gc
import resource
from pathlib import Path

import pytest
import torch

from peft_serve.adapters.own_memory import own_memory

STATM = Path("/proc/self/statm")
NUM_BYTES = 64 << 20


def resident_bytes() -> int:
    """Of this process."""
    return int(STATM.read_text().split()[1]) * resource.getpagesize()


@pytest.mark.parametrize("num_numbers", [0, 1, 1000, 1 << 18])
def test_it_holds_what_is_written(num_numbers: int) -> None:
    memory = own_memory(num_numbers, torch.bfloat16)
    memory.fill_(3)
    assert (memory.shape, memory.dtype) == ((num_numbers,), torch.bfloat16)
    assert memory.untyped_storage().nbytes() == 2 * num_numbers
    assert bool((memory == 3).all())


@pytest.mark.skipif(not STATM.exists(), reason="the system does not tell what is resident")
def test_it_goes_back_to_the_system_with_its_last_view() -> None:
    pieces = [own_memory(NUM_BYTES // 4, torch.uint8).fill_(1) for _ in range(4)]  # each is less than what malloc maps
    view = pieces[0][1 << 20 :]
    del pieces
    gc.collect()
    before = resident_bytes()
    assert int(view[-1]) == 1, "a view keeps its piece"
    del view
    gc.collect()
    assert before - resident_bytes() > NUM_BYTES // 8, "and the last one gives it back"


def test_more_than_there_is_says_so() -> None:
    with pytest.raises(MemoryError, match="bytes of memory"):
        own_memory(1 << 60, torch.uint8)
