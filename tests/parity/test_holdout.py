"""A round of the random comparison, small enough for every run of the tests."""

from __future__ import annotations

import random

import pytest

from tests.parity.holdout import one_round


@pytest.mark.filterwarnings(
    "ignore:Model config"
)  # transformers, about GPT-2's end-of-sequence id in a small vocabulary
@pytest.mark.parametrize("kind", ["gpt2", "t5", "llama"])
def test_other_sizes_and_ranks_equal_peft(kind: str) -> None:
    assert one_round(kind, random.Random(11), num_adapters=6) == []
