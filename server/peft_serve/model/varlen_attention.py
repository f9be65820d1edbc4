"""Attention of a whole plan by torch's own kernel over blocks, where a machine has one that is worth it.

Decides which plans it serves, and tells it of a pass's rows, once for all layers. What it leaves goes to the next one
(`FirstThatCan`). Knows not how the kernel was found, nor why it was chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from peft_serve.core import PADDING_BLOCK
from peft_serve.kernels.varlen import DTYPES, LARGEST_HEAD, VarlenAttend
from peft_serve.model.attend import Terms
from peft_serve.model.attention import PlanKernel
from peft_serve.model.pools import KVPool
from peft_serve.model.ragged import Plan, Span

_ONE_PART: Final = 1
"""A context is read whole by one program. How torch cuts it otherwise depends on the longest context of the step, and
with it the bits of every row's result."""

_ANY: Final = -1  # a window without an end on this side


@dataclass(frozen=True, slots=True, eq=False)
class _Rows:
    """A plan as the kernel is told of it: int32 on the device, and two numbers on the host."""

    begins_N1: Tensor  # of each row's tokens in the step's line, and where the last one ends
    stops_N: Tensor  # context positions that each row reads
    blocks_NB: Tensor
    most_tokens: int
    most_positions: int


class VarlenPlans:
    """Rows that read blocks, without biases, caps and sinks."""

    def __init__(self, attend: VarlenAttend) -> None:
        self._attend = attend
        self._rows: dict[int, _Rows] = {}  # by plan

    def forget(self) -> None:
        """The pass is over: its plans are gone."""
        self._rows.clear()

    def attend(
        self,
        plan: Plan,
        pool: KVPool | None,
        q_THD: Tensor,
        k_TKD: Tensor,  # noqa: ARG002  # in the pool
        v_TKD: Tensor,  # noqa: ARG002
        layer: int,
        terms: Terms,
    ) -> Tensor | None:
        """[T, H, D] of all tokens of a plan, or None where it covers not what is asked."""
        if pool is None or not _is_covered(plan, q_THD, terms):
            return None
        rows = self._of(plan, pool)
        keys, values = (each.view(-1, pool.block_size, *each.shape[1:]) for each in pool.layer(layer))
        is_cross = any(span.num_source for span in plan.spans)
        return self._attend(
            q_THD if q_THD.stride(2) == 1 else q_THD.contiguous(),
            keys,
            values,
            rows.begins_N1,
            None,
            rows.most_tokens,
            rows.most_positions,
            scale=terms.scaling,
            window_size=(_ANY, _ANY) if is_cross else (_ANY if terms.window is None else terms.window - 1, 0),
            enable_gqa=q_THD.shape[1] != keys.shape[2],
            seqused_k=rows.stops_N,
            block_table=rows.blocks_NB,
            num_splits=_ONE_PART,
        )

    def _of(self, plan: Plan, pool: KVPool) -> _Rows:
        if id(plan) not in self._rows:
            self._rows[id(plan)] = _rows(plan.spans, pool.block_size, pool.device)
        return self._rows[id(plan)]


class FirstThatCan:
    """Kernels for plans in the order in which they are asked."""

    def __init__(self, kernels: Sequence[PlanKernel]) -> None:
        self._kernels = tuple(kernels)

    def forget(self) -> None:
        """The pass is over."""
        for kernel in self._kernels:
            kernel.forget()

    def attend(
        self, plan: Plan, pool: KVPool | None, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, layer: int, terms: Terms
    ) -> Tensor | None:
        """What the first kernel that covers the plan gives, or None."""
        for kernel in self._kernels:
            out = kernel.attend(plan, pool, q_THD, k_TKD, v_TKD, layer, terms)
            if out is not None:
                return out
        return None


def _is_covered(plan: Plan, q_THD: Tensor, terms: Terms) -> bool:
    head = q_THD.shape[2]
    if q_THD.dtype not in DTYPES or head % 8 or head > LARGEST_HEAD:
        return False
    if terms.bias is not None or terms.sinks_H is not None or terms.softcap:
        return False
    if any(span.absent for span in plan.spans):
        return False
    if any(span.num_source for span in plan.spans):
        return terms.window is None and all(span.num_source for span in plan.spans)
    # Positions that count for none are inside no window, and every token reads them.
    return terms.window is None or not any(span.num_unplaced for span in plan.spans)


def _rows(spans: Sequence[Span], block_size: int, device: torch.device) -> _Rows:
    stops = [span.num_source or span.stop for span in spans]
    counts = [-(-stop // block_size) for stop in stops]
    begins, width = [0], max(counts)
    for span in spans:
        begins.append(begins[-1] + span.num_tokens)
    tables = [[*span.blocks[:n], *[PADDING_BLOCK] * (width - n)] for span, n in zip(spans, counts, strict=True)]
    numbers = torch.tensor([*begins, *stops, *(block for table in tables for block in table)], dtype=torch.int32)
    if device.type == "cuda":
        numbers = numbers.pin_memory().to(device, non_blocking=True)
    begins_N1, stops_N, blocks = torch.split(numbers, [len(begins), len(stops), width * len(spans)])
    return _Rows(
        begins_N1=begins_N1,
        stops_N=stops_N,
        blocks_NB=blocks.view(len(spans), width),
        most_tokens=max(span.num_tokens for span in spans),
        most_positions=max(stops),
    )
