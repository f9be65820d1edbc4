"""Whether two compiled things are the same, bit by bit, and share tensors in the same places."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor


def assert_same_bits(one: object, other: object) -> None:
    """Raises AssertionError where types, names, values or any bit of a tensor differ."""
    first, second = list(_leaves(one, "")), list(_leaves(other, ""))
    assert [where for where, _ in first] == [where for where, _ in second]
    for (where, a), (_, b) in zip(first, second, strict=True):
        if not isinstance(a, Tensor):
            assert (type(a), a) == (type(b), b), where
            continue
        assert isinstance(b, Tensor), where
        assert (a.dtype, a.shape) == (b.dtype, b.shape), where
        assert torch.equal(_bits(a), _bits(b)), where
    assert _sharing(first) == _sharing(second), "tensors are shared in other places"


def _leaves(value: object, where: str) -> Iterator[tuple[str, object]]:
    if dataclasses.is_dataclass(value):
        for part in dataclasses.fields(value):
            yield from _leaves(getattr(value, part.name), f"{where}.{part.name}({type(value).__name__})")
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(item, f"{where}[{key}]")
    elif isinstance(value, tuple):
        for number, item in enumerate(value):
            yield from _leaves(item, f"{where}({number})")
        yield f"{where} length", len(value)
    else:
        yield where, value


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _sharing(leaves: list[tuple[str, object]]) -> list[int]:
    """For each tensor the place where it is first met."""
    seen: dict[int, int] = {}
    return [seen.setdefault(id(leaf), number) for number, (_, leaf) in enumerate(leaves) if isinstance(leaf, Tensor)]
