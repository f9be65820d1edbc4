"""Our safetensors parser against the format's own library, over shapes, types and values."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from peft_serve.adapters.header import FORMATS, parse_tensors
from peft_serve.adapters.limits import GateLimits
from peft_serve.adapters.verdict import Verdict

DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])
SHAPES = st.lists(st.integers(1, 4), min_size=1, max_size=4)


@settings(max_examples=60, deadline=None)
@given(described=st.lists(st.tuples(DTYPES, SHAPES), min_size=1, max_size=5), seed=st.integers(0, 99))
def test_what_the_library_saves_is_read_back(described: list[tuple[torch.dtype, list[int]]], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensors = {f"t{i}": torch.randn(shape, generator=generator).to(dtype) for i, (dtype, shape) in enumerate(described)}
    verdict = Verdict()
    parsed = parse_tensors(save(tensors, metadata={"format": "pt"}), GateLimits(), verdict)
    verdict.settle()
    assert {t.name for t in parsed} == tensors.keys()
    for stored in parsed:
        assert stored.is_within(65504.0)
        assert torch.equal(stored.load(), tensors[stored.name].float())


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize(
    "value", [0.0, -0.0, 1.0, -100.0, 100.0, 101.0, -101.0, math.nan, -math.nan, math.inf, -math.inf]
)
def test_bits_judge_values_as_numbers_do(dtype: str, value: float) -> None:
    tensor = torch.tensor([0.5, value, -0.5]).to(FORMATS[dtype].torch_dtype)
    (stored,) = parse_tensors(save({"t": tensor}), GateLimits(), Verdict())
    assert stored.is_within(100.0) == bool((tensor.float().abs() <= 100).all())


def test_the_largest_half_is_within_its_own_cap() -> None:
    (stored,) = parse_tensors(save({"t": torch.tensor([65504.0]).half()}), GateLimits(), Verdict())
    assert stored.is_within(65504.0)
    assert stored.is_within(1e30)


def test_offsets_that_are_not_aligned_are_read() -> None:
    tensors = {"a": torch.ones(3, dtype=torch.float16), "b": torch.arange(5, dtype=torch.float32)}
    parsed = {t.name: t for t in parse_tensors(save(tensors), GateLimits(), Verdict())}
    assert torch.equal(parsed["b"].load(), tensors["b"])
    assert parsed["b"].is_within(4.0)
    assert not parsed["b"].is_within(3.9)
