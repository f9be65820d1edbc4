"""What an adapter spends is counted in the base's type, and a tensor of many sites once."""

from __future__ import annotations

import pytest
import torch

from peft_serve.adapters.primitives import Affine, Dense, Sparse
from peft_serve.adapters.spending import Spending
from peft_serve.errors import AdapterInvalid


def test_shared_tensors_count_once_and_own_ones_each_time() -> None:
    shared = torch.zeros(10, 10)
    spending = Spending(torch.bfloat16, max_bytes=400)
    for _ in range(5):
        spending.add(Affine(maps=(Dense(shared),)))
    spending.add(Affine(maps=(Dense(torch.zeros(10, 10)),)))
    with pytest.raises(AdapterInvalid, match="400 bytes"):
        spending.add(Affine(shift=torch.zeros(1)))


def test_indices_keep_their_own_width() -> None:
    places = torch.zeros(10, dtype=torch.int64)
    spending = Spending(torch.bfloat16, max_bytes=10 * (8 + 2))
    spending.add(Affine(maps=(Sparse(places, places, torch.zeros(10)),)))
    with pytest.raises(AdapterInvalid, match="max-adapter-bytes"):
        spending.add(Affine(shift=torch.zeros(1)))
