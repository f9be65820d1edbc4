"""Maps by Fourier transforms against the matrices they stand for."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from peft_serve.kernels import transforms
from peft_serve.kernels.maps import compressed
from peft_serve.kernels.transforms import add_circulant_, add_spectrum_, circulant_spectrum
from tests.kernels.test_maps import normal

F32 = torch.float32


@given(m=st.integers(1, 4), n=st.integers(1, 4), side=st.integers(1, 9), tokens=st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_circulant(m: int, n: int, side: int, tokens: int) -> None:
    kernel = normal(m, n, side, dtype=F32)
    turns = [[(s - t) % side for s in range(side)] for t in range(side)]
    full = torch.cat([torch.cat([each[torch.tensor(turns)] for each in row], dim=1) for row in kernel])
    x, y = normal(tokens, n * side, dtype=F32), normal(tokens, m * side, dtype=F32)
    got = y.clone()
    add_circulant_(got, x, circulant_spectrum(kernel), side)
    torch.testing.assert_close(got, y + x @ full.T, rtol=1e-5, atol=1e-5)


@given(entries=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4)), max_size=12), tokens=st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_spectrum(entries: list[tuple[int, int]], tokens: int) -> None:
    rows = torch.tensor([row for row, _ in entries], dtype=torch.int64)
    columns = torch.tensor([column for _, column in entries], dtype=torch.int64)
    values = 20 * torch.randn(len(entries), generator=torch.Generator().manual_seed(len(entries)))
    spectrum = torch.zeros(4, 5).index_put((rows, columns), values, accumulate=True)
    x, y = normal(tokens, 5, dtype=F32), normal(tokens, 4, dtype=F32)
    got = y.clone()
    add_spectrum_(got, x, compressed(rows, columns, values, num_rows=4))
    torch.testing.assert_close(got, y + x @ torch.fft.ifft2(spectrum).real.T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once_at_the_end(dtype: torch.dtype) -> None:
    kernel, x, y = normal(2, 3, 4, dtype=F32), normal(3, 12, dtype=F32).to(dtype), normal(3, 8, dtype=F32).to(dtype)
    want = y.float()
    add_circulant_(want, x.float(), circulant_spectrum(kernel), 4)
    got = y.clone()
    add_circulant_(got, x, circulant_spectrum(kernel), 4)
    assert torch.equal(got, want.to(dtype))
    rows = compressed(torch.tensor([1, 7]), torch.tensor([2, 0]), torch.tensor([30.0, -9.0]), num_rows=8)
    want = y.float()
    add_spectrum_(want, x.float(), rows)
    got = y.clone()
    add_spectrum_(got, x, rows)
    assert torch.equal(got, want.to(dtype))


@pytest.mark.parametrize(("tokens", "planned"), [(1, 1), (2, 2), (3, 4), (4, 4), (5, 8)])
def test_where_plans_are_kept_transforms_are_of_powers_of_two(
    tokens: int, planned: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel, rows = (
        normal(2, 3, 4, dtype=F32),
        compressed(torch.tensor([1]), torch.tensor([2]), normal(1).float(), num_rows=8),
    )
    x, y = normal(tokens, 12, dtype=F32), normal(tokens, 8, dtype=F32)

    spectrum, counted = circulant_spectrum(kernel), set[int]()

    def both() -> tuple[Tensor, Tensor]:
        turned, sparse = y.clone(), y.clone()
        add_circulant_(turned, x, spectrum, 4)
        add_spectrum_(sparse, x, rows)
        return turned, sparse

    exact = both()
    for name in ("rfft", "irfft", "ifft"):
        monkeypatch.setattr(torch.fft, name, partial(_counting, getattr(torch.fft, name), counted))
    monkeypatch.setattr(transforms, "_has_plans", lambda _: True)
    torch.testing.assert_close(both(), exact)
    assert counted == {planned}


def _counting(transform: Callable[..., Tensor], counted: set[int], x: Tensor, **more: int) -> Tensor:
    counted.add(len(x))
    return transform(x, **more)
