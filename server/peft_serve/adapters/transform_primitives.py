"""Linear maps that are cheap in the basis of a Fourier transform, and matrices without structure outside it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Circulant:
    """x -> W x, W of m x n circulant blocks of [b, b]: entry [t, s] of a block is kernel[(s - t) mod b].

    `kernel_MNB`: o = m b, i = n b.
    """

    kernel_MNB: Tensor


@dataclass(frozen=True, slots=True)
class Spectrum:
    """x -> W x, W the real part of the inverse Fourier transform of a sparse [o, i] matrix; entries at one place add.

    With the transform of vectors F: W x = Re(F_o^-1 S F_i^-1 x).
    """

    out_N: Tensor  # int64
    in_N: Tensor  # int64
    values_N: Tensor
