"""Memory on large pages: aligned, nobody else's, and alive as long as what lies in it."""

from __future__ import annotations

import gc
import re
import sys
from pathlib import Path

import pytest
import torch

from peft_serve.kernels.large_pages import PAGE_BYTES, PIECE_BYTES, LargePages


def test_tensors_share_a_piece_and_no_number() -> None:
    memory = LargePages()
    sizes = [1, 17, 0, 64, 5000, 3]
    made = [
        memory.empty(size, dtype).fill_(i)
        for i, (size, dtype) in enumerate(zip(sizes, 3 * [torch.float32, torch.bfloat16], strict=True))
    ]
    del memory
    gc.collect()
    assert [len(tensor) for tensor in made] == sizes
    assert all((tensor == i).all() for i, tensor in enumerate(made))
    assert all(tensor.data_ptr() % 64 == 0 for tensor in made)
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in made)  # what is counted as held
    places = [tensor.data_ptr() for tensor in made if len(tensor)]
    assert max(places) - min(places) < PAGE_BYTES


def test_what_is_larger_than_a_piece_and_what_no_longer_fits_get_their_own() -> None:
    memory = LargePages()
    large = memory.empty(PIECE_BYTES + 1, torch.uint8)
    small = memory.empty(8, torch.uint8)
    assert len(large) == PIECE_BYTES + 1
    large[-1], small[0] = 1, 2
    assert (int(large[-1]), int(small[0])) == (1, 2)
    first, second = (memory.empty(PIECE_BYTES - 4096, torch.uint8) for _ in range(2))
    assert abs(first.data_ptr() - second.data_ptr()) >= len(first)


@pytest.mark.skipif(sys.platform != "linux", reason="large pages are asked for on Linux only")
def test_large_pages_are_asked_for() -> None:
    tensor = LargePages().empty(PAGE_BYTES, torch.uint8)
    assert tensor.data_ptr() % PAGE_BYTES == 0
    maps = Path("/proc/self/smaps").read_text()
    if "VmFlags" not in maps or not Path("/sys/kernel/mm/transparent_hugepage").exists():
        pytest.skip("this kernel does not tell, or has none")
    for start, end, facts in re.findall(
        r"^([0-9a-f]+)-([0-9a-f]+) (.*?VmFlags:[^\n]*)", maps, re.DOTALL | re.MULTILINE
    ):
        if int(start, 16) <= tensor.data_ptr() < int(end, 16):
            assert "hg" in facts.rsplit("VmFlags:", 1)[1].split()
            return
    pytest.fail("the tensor lies nowhere")
