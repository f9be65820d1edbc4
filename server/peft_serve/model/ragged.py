"""How the rows of a step lie side by side, and what each of their tokens may read.

The tokens of all rows stand in one flat line of `T`, without padding. A `Plan` says, for one kind of
attention, where the step's keys and values are written and which rows attend together. Its index tensors are
computed once a step and read by every layer. This module knows no model.

Shapes: `T` tokens of the step, `R` rows of a group, `M` tokens of each of its rows, `C` context positions
(padded to whole blocks of the group's longest row), `H` query heads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from peft_serve.core import PADDING_BLOCK
from peft_serve.model.pools import places_of
from peft_serve.model.sending import sent

_MAX_PADDING_BLOCKS = 32
"""Rows share a group while padding costs each of them less than this, or less than its own context."""


@dataclass(frozen=True, slots=True, eq=False)
class Front:
    """Keys and values that a row reads before its own: an adapter's prefix."""

    keys_LHPD: Tensor
    values_LHPD: Tensor
    advances_positions: bool = True  # the tokens behind it count their positions from its end
    absent: frozenset[int] = frozenset()  # layers that have none

    @property
    def num_tokens(self) -> int:
        return self.keys_LHPD.shape[2]

    @property
    def num_positions(self) -> int:
        """Positions it takes from the tokens behind it."""
        return self.num_tokens if self.advances_positions else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """One row, as attention sees it."""

    num_tokens: int  # tokens it brings in this step
    start: int = 0  # context position of the first of them
    blocks: tuple[int, ...] = ()
    num_source: int = 0  # length of its cross-attention context
    front: Front | None = None  # what it reads before its own tokens, on an encoder
    num_unplaced: int = 0  # of its cached context: the first positions, which every token reads and none counts
    absent: frozenset[int] = frozenset()  # layers at which these are not there

    @property
    def stop(self) -> int:
        return self.start + self.num_tokens


@dataclass(frozen=True, slots=True, eq=False)
class RelativeBias:
    """Scores that depend on the distance alone (T5): `table_HX[:, far + clamp(key - query, -far, far)]`."""

    table_HX: Tensor  # X = 2 * far + 1
    far: int  # from this distance on the bias no longer changes

    def of(self, relative: Tensor, _places_C: Tensor) -> Tensor:
        """The bias [H, ..., C] of key position - query position [..., C].

        Keys without positions count for a key, and not for a query (`T5Attention.compute_bias` in AdapterHub).
        """
        return self.table_HX[:, relative.clamp(-self.far, self.far) + self.far]


@dataclass(frozen=True, slots=True, eq=False)
class SlopeBias:
    """Scores that grow with the position of the key, by head (ALiBi, arXiv:2108.12409).

    Adding one number to all scores of a query changes nothing, so the key's own position does as well as its
    distance. Models round that product in a dtype of their own, that of `slopes_H`, and then divide it.
    """

    slopes_H: Tensor
    divisor: float = 1.0

    def of(self, relative: Tensor, places_C: Tensor) -> Tensor:
        """The bias [H, ..., C] of keys at positions `places_C`, for as many queries as `relative` [..., C] has."""
        by_key_HC = (self.slopes_H[:, None] * places_C).float() / self.divisor
        shape = (by_key_HC.shape[0], *(1 for _ in relative.shape[:-1]), by_key_HC.shape[1])
        return by_key_HC.view(shape).expand(-1, *relative.shape)


Bias = RelativeBias | SlopeBias
"""What a layer adds to the scores of its keys."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Rows of equally many tokens that attend in one call."""

    where: slice | Tensor  # their tokens in the step's line, row after row
    num_rows: int
    num_tokens: int  # of each row
    masks: dict[tuple[int | None, Bias | None, int | None], Tensor] = field(default_factory=dict)
    # memo of `mask`: the layers of a step ask for the same few


@dataclass(frozen=True, slots=True, kw_only=True)
class Fresh(Group):
    """Rows whose whole context is in this step: keys and values need not be read back."""

    is_causal: bool
    front: Front | None = None  # the same one for every row

    def mask(self, window: int | None, bias: Bias | None, like: Tensor, layer: int) -> Tensor:
        """What is added to the scores: [1, 1 or H, M, what is in front and M] of `like`'s dtype and device."""
        num_front = 0 if self.front is None or layer in self.front.absent else self.front.num_tokens
        key = (window, bias, num_front)
        if key not in self.masks:
            place = torch.arange(num_front + self.num_tokens, device=like.device)
            relative = place[None, :] - place[: self.num_tokens, None]
            self.masks[key] = _additive(relative[None], place, window, bias, like.dtype, self.is_causal)
        return self.masks[key]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cached(Group):
    """Rows that read their context from blocks."""

    blocks: Tensor  # [R * blocks of a row], padded with block 0
    last_RM: Tensor  # the last context position each token may read
    block_size: int
    unplaced_R: Tensor | None = None  # how many of its first positions carry no position; None: none of any row
    absent: tuple[frozenset[int], ...] = ()  # by row, layers at which these are not there; empty: they are everywhere

    def mask(self, window: int | None, bias: Bias | None, like: Tensor, layer: int) -> Tensor:
        """What is added to the scores: [R, 1 or H, M, C] of `like`'s dtype."""
        key = (window, bias, layer if self.absent else None)
        if key not in self.masks:
            num_positions = self.blocks.shape[0] // self.num_rows * self.block_size
            place = torch.arange(num_positions, device=self.last_RM.device)
            relative = place - self.last_RM[..., None]
            leads = None if self.unplaced_R is None else self._leads(self.unplaced_R, layer)
            self.masks[key] = _additive(relative, place, window, bias, like.dtype, is_causal=True, leads=leads)
        return self.masks[key]

    def _leads(self, unplaced_R: Tensor, layer: int) -> _Leads:
        here = [layer not in absent for absent in self.absent] or [True] * self.num_rows
        return _Leads(unplaced_R[:, None, None], torch.tensor(here, device=unplaced_R.device)[:, None, None])


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One kind of attention in one step."""

    spans: tuple[Span, ...]
    fresh: tuple[Fresh, ...] = ()
    cached: tuple[Cached, ...] = ()
    writes_T: Tensor | None = None  # places of the step's keys and values; None: nothing is stored
    clears: tuple[int, ...] = ()  # blocks that begin a new life in this step

    @property
    def is_one_group(self) -> bool:
        """Whether all tokens, in the order of the line, are one cached group."""
        return not self.fresh and len(self.cached) == 1 and isinstance(self.cached[0].where, slice)


@dataclass(frozen=True, slots=True)
class _Leads:
    """The first positions of each row's context that carry no position, and whether the layer has them."""

    count_R11: Tensor
    is_here_R11: Tensor


def _additive(
    relative_RMC: Tensor,
    places_C: Tensor,
    window: int | None,
    bias: Bias | None,
    dtype: torch.dtype,
    is_causal: bool,
    *,
    leads: _Leads | None = None,
) -> Tensor:
    """Bias where a token may read, -inf where it may not.

    `relative` is key position - last readable one, `places_C` are the key positions. A window does not reach what
    carries no position: it is read from everywhere.
    """
    shape = relative_RMC.shape
    if bias is None:
        mask = torch.zeros((shape[0], 1, *shape[1:]), dtype=dtype, device=relative_RMC.device)
    else:
        counted = relative_RMC if leads is None else relative_RMC + leads.count_R11
        mask = bias.of(counted, places_C).to(dtype).transpose(0, 1).contiguous()
    if is_causal:
        hidden = relative_RMC > 0
        if window is not None:
            hidden |= relative_RMC <= -window
        if leads is not None:
            hidden = torch.where(places_C < leads.count_R11, ~leads.is_here_R11, hidden)
        mask.masked_fill_(hidden[:, None], float("-inf"))
    return mask


def plan_self(spans: Sequence[Span], *, block_size: int, device: torch.device) -> Plan:
    """Causal attention over each row's own blocks."""
    fresh = [(at, s) for at, s in _placed(spans) if s.start == 0 and s.num_tokens > 1]
    cached = [(at, s, s.stop) for at, s in _placed(spans) if s.start > 0 or s.num_tokens == 1]
    writes = [p for s in spans for p in places_of(s.blocks, s.start, s.num_tokens, block_size)]
    writes_T, groups = _cached(cached, writes, block_size, device, is_causal=True)
    return Plan(
        spans=tuple(spans),
        fresh=tuple(_fresh(fresh, is_causal=True, device=device)),
        cached=groups,
        writes_T=writes_T,
        clears=tuple(b for s in spans for b in _begun(s, block_size)),
    )


def plan_source(lengths: Sequence[int], *, device: torch.device, fronts: Sequence[Front | None] | None = None) -> Plan:
    """Attention in both directions inside each row, and over what stands in front of it: an encoder."""
    each = fronts or [None] * len(lengths)
    spans = tuple(Span(num_tokens=n, front=front) for n, front in zip(lengths, each, strict=True))
    return Plan(spans=spans, fresh=tuple(_fresh(list(_placed(spans)), is_causal=False, device=device)))


def plan_cross(spans: Sequence[Span], new: Sequence[Span], *, block_size: int, device: torch.device) -> Plan:
    """Attention of every row over its source; the keys and values of the `new` rows come with the step.

    A span's blocks are those of its cross-attention context. `new` are the spans of the encoded rows, in
    their order, with `num_tokens` their number of source tokens and `start` what stands in front of these.
    """
    cached = [(at, s, s.num_source) for at, s in _placed(spans)]
    writes = [p for s in new for p in places_of(s.blocks, s.start, s.num_tokens, block_size)]
    writes_T, groups = _cached(cached, writes, block_size, device, is_causal=False)
    return Plan(
        spans=tuple(spans),
        cached=groups,
        writes_T=writes_T if new else None,
        clears=tuple(b for s in new for b in _begun(s, block_size)),
    )


def _placed(spans: Sequence[Span]) -> Iterator[tuple[int, Span]]:
    """Each span with the place of its first token in the line."""
    at = 0
    for span in spans:
        yield at, span
        at += span.num_tokens


def _begun(span: Span, block_size: int) -> list[int]:
    """The block whose first position this row writes but which it does not fill: the rest is a stranger's."""
    last = span.stop // block_size
    starts_here = span.start <= last * block_size < span.stop
    return [span.blocks[last]] if starts_here else []


def _fresh(placed: Sequence[tuple[int, Span]], *, is_causal: bool, device: torch.device) -> Iterator[Fresh]:
    alike: dict[tuple[int, Front | None], list[int]] = {}
    for at, span in placed:
        alike.setdefault((span.num_tokens, span.front), []).append(at)
    for (length, front), starts in alike.items():
        yield Fresh(
            where=_where(starts, length, device),
            num_rows=len(starts),
            num_tokens=length,
            is_causal=is_causal,
            front=front,
        )


def _cached(
    placed: Sequence[tuple[int, Span, int]], writes: list[int], block_size: int, device: torch.device, is_causal: bool
) -> tuple[Tensor, tuple[Cached, ...]]:
    """The places that are written, on the device, and the groups; their numbers travel together."""
    groups = list(_alike(placed, block_size))
    numbers = [each for members in groups for each in _numbers(members, block_size, is_causal)]
    writes_T, *each = sent([writes, *numbers], device)
    return writes_T, tuple(
        Cached(
            where=_where([at for at, _, _ in members], members[0][1].num_tokens, device),
            num_rows=len(members),
            num_tokens=members[0][1].num_tokens,
            blocks=blocks,
            last_RM=last.view(len(members), -1),
            block_size=block_size,
            unplaced_R=_unplaced([span for _, span, _ in members], device),
            absent=_absent([span for _, span, _ in members]),
        )
        for members, blocks, last in zip(groups, each[::2], each[1::2], strict=True)
    )


def _numbers(members: Sequence[tuple[int, Span, int]], block_size: int, is_causal: bool) -> tuple[list[int], list[int]]:
    """The block table of a group's rows, padded to the longest, and the last position that each token reads."""
    width = max(_ceil(context, block_size) for _, _, context in members)
    table: list[int] = []
    last: list[int] = []
    for _, span, context in members:
        used = _ceil(context, block_size)
        table.extend((*span.blocks[:used], *[PADDING_BLOCK] * (width - used)))
        last.extend(range(span.start, span.stop) if is_causal else [context - 1] * span.num_tokens)
    return table, last


def _unplaced(spans: Sequence[Span], device: torch.device) -> Tensor | None:
    counts = [span.num_unplaced for span in spans]
    return sent([counts], device)[0] if any(counts) else None


def _absent(spans: Sequence[Span]) -> tuple[frozenset[int], ...]:
    each = tuple(span.absent for span in spans)
    return each if any(each) else ()


def _alike(placed: Sequence[tuple[int, Span, int]], block_size: int) -> Iterator[list[tuple[int, Span, int]]]:
    """Rows of equally many tokens and not too different contexts, each group in the order of the line."""
    by_length: dict[int, list[tuple[int, Span, int]]] = {}
    for entry in placed:
        by_length.setdefault(entry[1].num_tokens, []).append(entry)
    for entries in by_length.values():
        group: list[tuple[int, Span, int]] = []
        longest = 0
        for entry in sorted(entries, key=lambda e: -e[2]):
            own = _ceil(entry[2], block_size)
            if group and longest - own > max(own, _MAX_PADDING_BLOCKS):
                yield sorted(group, key=lambda e: e[0])
                group = []
            if not group:
                longest = own
            group.append(entry)
        yield sorted(group, key=lambda e: e[0])


def _where(starts: Sequence[int], length: int, device: torch.device) -> slice | Tensor:
    """The tokens of rows of one length: a slice if they follow each other, which costs no copy."""
    if all(b - a == length for a, b in pairwise(starts)):
        return slice(starts[0], starts[-1] + length)
    return sent([[at + i for at in starts for i in range(length)]], device)[0]


def _ceil(value: int, step: int) -> int:
    return -(-value // step)
