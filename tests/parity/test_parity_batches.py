"""A sample of random mixed batches against their rows alone; more: `python -m tests.parity.batches --batches 200`."""

from __future__ import annotations

import random

import pytest

from tests.parity.batches import FAMILIES, compare


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_batch_changes_no_answer(kind: str) -> None:
    assert compare(kind, random.Random(FAMILIES.index(kind)), num_batches=6, num_adapters=6) == []
