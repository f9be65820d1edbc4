"""Sums of shared low-rank maps, weighed for each adapter: y += sum_pq B[:, pq] w[pq] (A[p] . (g[q] * x)).

A [r, s] and B [l, r n] are the same for every adapter, `w` [r n] and the gains `g` [n, s] its own. B is as large as
the site and is multiplied once for all tokens; what is multiplied for each adapter is as large as its gains.
A name that ends in `_` changes y in place, only that. Nothing here knows whose the tokens are.

Shapes: `N` tokens of some adapters, in runs of one adapter each; `S` the smaller and `L` the larger side of the site,
`R` ranks of A, `Q` gain vectors, `C` = R Q columns of B, ranks first: column c belongs to rank c // Q and gain c % Q.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from peft_serve.kernels.subsets import Tokens

_MAX_GAINED = 1 << 21
"""Numbers that the products with gains of several runs may hold at once: 8 MiB in float32."""


@dataclass(frozen=True, slots=True)
class Gained:
    """Tokens [first, last) of those taken, and the gains of their adapter."""

    first: int
    last: int
    gains_QS: Tensor


def add_bases_(
    y_TO: Tensor, x_TI: Tensor, tokens: Tokens, a_RS: Tensor, b_LC: Tensor, weights_NC: Tensor, runs: Sequence[Gained]
) -> None:
    """y += B (w * (A (g * x))), x as wide as A. The runs divide what is taken of the tokens."""
    x_NS = tokens.take(x_TI)
    parts = [_shrink(x_NS[group[0].first : group[-1].last], a_RS, group) for group in _groups(runs, len(a_RS))]
    low_NC = parts[0] if len(parts) == 1 else torch.cat(parts)
    tokens.add_(y_TO, low_NC.mul_(weights_NC) @ b_LC.t())


def add_transposed_bases_(
    y_TO: Tensor, x_TI: Tensor, tokens: Tokens, a_RS: Tensor, b_LC: Tensor, weights_NC: Tensor, runs: Sequence[Gained]
) -> None:
    """The transpose of the map: y += sum_q g[q] * (A^T (w * (B^T x))), x as wide as B."""
    low_NC = (tokens.take(x_TI) @ b_LC).mul_(weights_NC)
    parts = [_expand(low_NC[group[0].first : group[-1].last], a_RS, group) for group in _groups(runs, len(a_RS))]
    tokens.add_(y_TO, parts[0] if len(parts) == 1 else torch.cat(parts))


def _groups(runs: Sequence[Gained], num_ranks: int) -> Iterator[Sequence[Gained]]:
    """A run of more tokens than ranks alone, short ones that follow each other together as far as memory allows."""
    group: list[Gained] = []
    for run in runs:
        num_gained = (run.last - group[0].first if group else 0) * run.gains_QS.numel()
        is_long = _is_long(run, num_ranks)
        if group and (is_long or num_gained > _MAX_GAINED):
            yield group
            group = []
        if is_long:
            yield [run]
        else:
            group.append(run)
    if group:
        yield group


def _is_long(run: Gained, num_ranks: int) -> bool:
    """Whether the gains are cheaper multiplied with A, which has a row for each rank, than with the tokens."""
    return run.last - run.first > num_ranks


def _shrink(x_NS: Tensor, a_RS: Tensor, group: Sequence[Gained]) -> Tensor:
    """[N, C] A (g * x) of a group's tokens."""
    if _is_long(group[0], len(a_RS)):
        return x_NS @ _gained(a_RS, group[0].gains_QS).t()
    x_NQS = x_NS.new_empty(len(x_NS), *group[0].gains_QS.shape)
    for run, here in _places(group):
        torch.mul(x_NS[here, None], run.gains_QS, out=x_NQS[here])
    low_NQR = (x_NQS.flatten(0, 1) @ a_RS.t()).view(len(x_NS), -1, len(a_RS))
    return low_NQR.transpose(1, 2).reshape(len(x_NS), -1)


def _expand(low_NC: Tensor, a_RS: Tensor, group: Sequence[Gained]) -> Tensor:
    """[N, S] sum_q g[q] * (A^T u[q]) of a group's tokens."""
    if _is_long(group[0], len(a_RS)):
        return low_NC @ _gained(a_RS, group[0].gains_QS)
    low_NQR = low_NC.view(len(low_NC), len(a_RS), -1).transpose(1, 2)
    y_NQS = (low_NQR.reshape(-1, len(a_RS)) @ a_RS).view(len(low_NC), -1, a_RS.shape[1])
    for run, here in _places(group):
        y_NQS[here].mul_(run.gains_QS)
    return y_NQS.sum(1)


def _gained(a_RS: Tensor, gains_QS: Tensor) -> Tensor:
    """[C, S]"""
    return (a_RS[:, None] * gains_QS).flatten(0, 1)


def _places(group: Sequence[Gained]) -> Iterator[tuple[Gained, slice]]:
    """Each run, and its tokens counted from the first of the group."""
    start = group[0].first
    return ((run, slice(run.first - start, run.last - start)) for run in group)
