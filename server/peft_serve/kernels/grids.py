"""Grids: the adapters of one width, side by side in a stack, as one batched product.

    for each group g of the grid:   y[own(g)] += (x[own(g)] A_g^T) B_g        two `bmm`, whatever the number of groups

Every group is given as many places as the largest has tokens; places without a token compute on some token and are
left out of the result, so nothing of one adapter reaches another's tokens. A `Grid` is made once for a step and
serves every site with the same adapters.

Shapes: `G` groups, `P` places of a group, `W` rows (the width) of a group, `I` in and `O` out features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from peft_serve.kernels.grouped import STREAMED_TOKENS, Piece

_GRID_COST = 600_000
"""What the calls of one grid cost beside their arithmetic, in multiply-adds: two `bmm` and the picking of tokens."""

_MAX_IDLE = 2
"""A grid may hold so many times the groups that have tokens: the others are read for nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """Groups of `width` rows, from `first_row` of the stack on, and where their tokens are."""

    first_row: int
    num_groups: int
    width: int
    num_places: int  # of a group
    first_token: int  # the grid's own tokens are [first_token, last_token) when `own_N` is None
    last_token: int
    own_N: Tensor | None  # else these
    take_P: Tensor | None  # [G * P] the token at each place; None when place and own token coincide
    give_N: Tensor | None  # [N] the place of each own token

    def cost(self, features: int) -> int:
        """Multiply-adds of a site with so many in + out features, calls included."""
        return self.num_groups * self.width * max(self.num_places, STREAMED_TOKENS) * features + _GRID_COST

    def rows(self, stack_R: Tensor) -> Tensor:
        """The grid's part of a stack, [G, W, I or O]."""
        last = self.first_row + self.num_groups * self.width
        return stack_R[self.first_row : last].view(self.num_groups, self.width, -1)


def grids_of(pieces: Sequence[Piece], device: torch.device) -> tuple[Grid, ...] | None:
    """One grid for each width among the pieces; None where adapters do not lie on one, or too far apart."""
    by_width: dict[int, list[Piece]] = {}
    for piece in pieces:
        by_width.setdefault(piece[3] - piece[2], []).append(piece)
    grids: list[Grid] = []
    for width, members in by_width.items():
        first_row = min(piece[2] for piece in members)
        offsets = [piece[2] - first_row for piece in members]
        num_groups = max(offsets) // width + 1
        if any(offset % width for offset in offsets) or num_groups > _MAX_IDLE * len(set(offsets)):
            return None
        groups = [offset // width for offset in offsets]
        grids.append(_grid(width, first_row, num_groups, groups, members, device))
    return tuple(grids)


def _grid(
    width: int, first_row: int, num_groups: int, groups: Sequence[int], members: Sequence[Piece], device: torch.device
) -> Grid:
    tokens: dict[int, list[int]] = {}  # of each group: an adapter may have several runs
    for group, (first, last, _, _) in zip(groups, members, strict=True):
        tokens.setdefault(group, []).extend(range(first, last))
    num_places = max(map(len, tokens.values()))
    take = [members[0][0]] * (num_groups * num_places)
    own: list[int] = []
    give: list[int] = []
    for group, its in tokens.items():
        for place, token in enumerate(its, start=group * num_places):
            take[place] = token
            own.append(token)
            give.append(place)
    is_run = own == list(range(own[0], own[-1] + 1))
    is_regular = is_run and take == own
    return Grid(
        first_row=first_row,
        num_groups=num_groups,
        width=width,
        num_places=num_places,
        first_token=own[0],
        last_token=own[-1] + 1,
        own_N=None if is_run else torch.tensor(own, device=device),
        take_P=None if is_regular else torch.tensor(take, device=device),
        give_N=None if is_regular else torch.tensor(give, device=device),
    )


GridPart = tuple[Grid, Tensor, Tensor]
"""A grid with a site's own rows: A [G, W, I], B [G, W, O]."""


def add_low_rank_grids_(y_TO: Tensor, x_TI: Tensor, parts: Sequence[GridPart]) -> Tensor:
    """y += own(x A^T) B for the adapters of every grid; the tokens of no grid stay as they are."""
    for grid, a_GWI, b_GWO in parts:
        own_x = x_TI[grid.first_token : grid.last_token] if grid.take_P is None else x_TI.index_select(0, grid.take_P)
        x_GPI = own_x.view(grid.num_groups, grid.num_places, -1)
        u_GPW = torch.bmm(x_GPI, a_GWI.transpose(1, 2))
        if grid.take_P is None:  # places, own tokens and their order are one: the product is added where it belongs
            y_TO[grid.first_token : grid.last_token].view(*x_GPI.shape[:2], -1).baddbmm_(u_GPW, b_GWO)
            continue
        d_PO = torch.bmm(u_GPW, b_GWO).view(-1, b_GWO.shape[2])
        d_NO = d_PO if grid.give_N is None else d_PO.index_select(0, grid.give_N)
        if grid.own_N is None:
            y_TO[grid.first_token : grid.last_token].add_(d_NO)
        else:
            y_TO.index_add_(0, grid.own_N, d_NO)
    return y_TO
