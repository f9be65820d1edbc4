"""Zeros that are no memory yet."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from peft_serve.model.zeros import lazy_zeros

CPU = torch.device("cpu")
STATM = Path("/proc/self/statm")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_they_are_zeros_that_can_be_written(dtype: torch.dtype) -> None:
    made = lazy_zeros((2, 3, 5), dtype, CPU)
    assert torch.equal(made, torch.zeros(2, 3, 5, dtype=dtype))
    made[1, 2].fill_(7)
    assert made.sum() == 35
    assert lazy_zeros((0, 3), dtype, CPU).shape == (0, 3)


@pytest.mark.skipif(not STATM.exists(), reason="only Linux says how much memory a process has")
def test_they_take_no_memory_before_they_are_written() -> None:
    def pages() -> int:
        return int(STATM.read_text().split()[1])

    before = pages()
    made = lazy_zeros((64, 1 << 20), torch.uint8, CPU)
    assert pages() - before < 512
    made[:4].fill_(1)
    assert 1000 < pages() - before < 2048
    assert not made[4:].any()
