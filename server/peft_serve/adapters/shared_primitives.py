"""Linear maps whose factors many adapters share: large factors under a key, and what is an adapter's own."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Rescaled:
    """x -> u * (B (v * (A x))): a low-rank map whose factors many adapters share (VeRA), and two vectors of its own.

    `a_RI` and `b_OR` may be larger than the site: its own are the first `i` columns of A and the first `o` rows of B.
    Maps with one `key` have the same factors, which the executor therefore holds once, whatever the adapters.
    """

    key: str
    a_RI: Tensor
    b_OR: Tensor
    inner_R: Tensor
    outer_O: Tensor

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """What maps of this key share."""
        return self.a_RI, self.b_OR


@dataclass(frozen=True, slots=True)
class SharedBases:
    """x -> sum_pq B[:, pq] w[p, q] (A[p] . (g[q] * x)), or its transpose: low-rank maps of shared factors (RandLoRA).

    A [r, s] has a row for each rank, B [l, c] a column for each rank p and gain vector q, p n + q; `s` and `l` are at
    least the smaller and the larger side of the site, whose own are the first ones of either. The weights w [r, n] and
    the gains g [n, s] are the adapter's. `is_transposed`: the site's outputs are the smaller side.
    Maps with one `key` have the same factors, which the executor therefore holds once, whatever the adapters.
    """

    key: str
    a_RS: Tensor
    b_LC: Tensor
    weights_RQ: Tensor
    gains_QS: Tensor
    is_transposed: bool

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """What maps of this key share."""
        return self.a_RS, self.b_LC


SharedMap = Rescaled | SharedBases
"""A map whose factors many adapters share."""
