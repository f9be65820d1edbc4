"""The randomised singular value decomposition of torch, on a random generator of its own.

`torch.svd_lowrank` draws from the process's generator, which a server must leave alone; a seeded generator of the
same kind gives the same numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor


def svd_lowrank(matrix_MN: Tensor, rank: int, *, niter: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """U [m, r], S [r] and V^T [r, n] as `torch.manual_seed(seed); torch.svd_lowrank(matrix, rank, niter)` finds them.

    Algorithm 5.1 of Halko, Martinsson and Tropp (arXiv:0909.4061) with `niter` subspace iterations.
    """
    num_rows, num_columns = matrix_MN.shape
    is_wide = num_rows < num_columns
    tall = matrix_MN.mH if is_wide else matrix_MN
    basis = _basis(tall, rank, niter, torch.Generator().manual_seed(seed))
    u, s, v = torch.linalg.svd(basis.mH @ tall, full_matrices=False)
    u = basis @ u
    return (v.mH, s, u.mH) if is_wide else (u, s, v)


def _basis(tall: Tensor, rank: int, niter: int, generator: torch.Generator) -> Tensor:
    """An orthonormal basis of nearly all that `tall` maps to."""
    draw = torch.randn(tall.shape[1], rank, generator=generator)
    basis: Tensor = torch.linalg.qr(tall @ draw).Q
    for _ in range(niter):
        basis = torch.linalg.qr(tall.mH @ basis).Q
        basis = torch.linalg.qr(tall @ basis).Q
    return basis
