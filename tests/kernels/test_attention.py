"""Attention over blocks where they lie: the slow truth's result, alone and in any batch to the bit."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from peft_serve.kernels.attention import PagedAttention
from peft_serve.kernels.native import NativeCode, cache_folder, find_compiler

pytestmark = pytest.mark.skipif(find_compiler(os.environ) is None, reason="this machine has no C++ compiler")
BLOCK_SIZE = 4


@pytest.fixture(scope="module")
def attention() -> PagedAttention:
    return PagedAttention(NativeCode(find_compiler(os.environ), cache_folder(os.environ)))


def _random(*size: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(sum(size))).to(dtype)


def _exact(q_HD: Tensor, k_CKD: Tensor, v_CKD: Tensor, window: int | None, scaling: float) -> Tensor:
    k_CKD, v_CKD = (x if window is None else x[-window:] for x in (k_CKD, v_CKD))
    group = q_HD.shape[0] // k_CKD.shape[1]
    k, v = (x.double().repeat_interleave(group, dim=1) for x in (k_CKD, v_CKD))
    shares = (torch.einsum("hd,chd->hc", q_HD.double(), k) * scaling).softmax(-1)
    return torch.einsum("hc,chd->hd", shares, v)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 1, 33])
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head"),
    [(4, 4, 16), (6, 2, 64), (7, 1, 80), (2, 1, 256), (9, 1, 24), (16, 1, 8), (10, 2, 40)],
)
def test_rows_attend_to_their_own_blocks(
    attention: PagedAttention, num_heads: int, num_kv_heads: int, head: int, window: int | None, dtype: torch.dtype
) -> None:
    lengths = [1, 3, 4, 8, 9, 16, 17, 31, 32, 33, 49, 100, 129]
    width = -(-max(lengths) // BLOCK_SIZE)
    num_blocks = width * len(lengths) + 1
    k_PKD, v_PKD = (_random(num_blocks * BLOCK_SIZE, num_kv_heads, head, dtype=dtype) * 2 for _ in range(2))
    tables_RW = (torch.randperm(num_blocks - 1, generator=torch.Generator().manual_seed(0)) + 1).view(-1, width)
    q_RHD = _random(num_heads, len(lengths), head, dtype=dtype).transpose(0, 1)  # as rotary embeddings leave it
    scaling = 2 * head**-0.5
    pages = attention.pages(k_PKD, v_PKD, BLOCK_SIZE)
    last_R = torch.tensor(lengths) - 1
    out_RHD = attention.attend(pages, attention.rows(tables_RW.flatten(), last_R, window), q_RHD, scaling)
    for row, length in enumerate(lengths):
        places = (tables_RW[row][:, None] * BLOCK_SIZE + torch.arange(BLOCK_SIZE)).flatten()[:length]
        exact_HD = _exact(q_RHD[row], k_PKD[places], v_PKD[places], window, scaling)
        room = 2.0**-8 * exact_HD.abs() + 1e-4 if dtype == torch.bfloat16 else 1e-5
        assert ((out_RHD[row] - exact_HD).abs() <= room).all()
        own = attention.rows(tables_RW[row], last_R[row : row + 1], window)
        assert torch.equal(attention.attend(pages, own, q_RHD[row : row + 1], scaling)[0], out_RHD[row])


@pytest.mark.parametrize("num_heads", [1, 5])
def test_nothing_behind_the_last_position_is_read(attention: PagedAttention, num_heads: int) -> None:
    k_PKD, v_PKD = (_random(12 * BLOCK_SIZE, 1, 16, dtype=torch.float32) for _ in range(2))
    q_RHD = _random(1, num_heads, 16, dtype=torch.float32)
    pages = attention.pages(k_PKD, v_PKD, BLOCK_SIZE)
    rows = attention.rows(torch.arange(12), torch.tensor([37]), None)
    before = attention.attend(pages, rows, q_RHD, 0.25)
    k_PKD[38:], v_PKD[38:] = float("nan"), float("inf")
    assert torch.equal(attention.attend(pages, rows, q_RHD, 0.25), before)
    k_PKD[37] = float("nan")
    assert attention.attend(pages, rows, q_RHD, 0.25).isnan().all()


def test_large_scores_do_not_overflow(attention: PagedAttention) -> None:
    k_PKD, v_PKD = (_random(20 * BLOCK_SIZE, 1, 16, dtype=torch.float32) for _ in range(2))
    q_RHD = 300 * _random(1, 2, 16, dtype=torch.float32)
    rows = attention.rows(torch.arange(20), torch.tensor([79]), None)
    out = attention.attend(attention.pages(k_PKD, v_PKD, BLOCK_SIZE), rows, q_RHD, 1.0)
    torch.testing.assert_close(out[0], _exact(q_RHD[0], k_PKD, v_PKD, None, 1.0).float(), rtol=1e-3, atol=1e-3)


def test_what_is_not_covered_is_said_beforehand(attention: PagedAttention) -> None:
    def like(head: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
        return torch.empty(4, 2, head, dtype=dtype, device=device)

    assert attention.covers(like(64), 14)
    assert not attention.covers(like(10), 2)
    assert not attention.covers(like(512), 2)
    assert not attention.covers(like(256), 128)
    assert not attention.covers(like(64, torch.float16), 2)
    assert not attention.covers(like(64, device="meta"), 2)
