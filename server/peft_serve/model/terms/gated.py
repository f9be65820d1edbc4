"""Gated prompts: a learned prompt that a token attends to beside its context (LLaMA-Adapter, arXiv 2303.16199).
By a kernel where there is one, else prompts of one form and runs of one length together.

o + gate * softmax(q K^T / sqrt(D)) V, q as attention gets it, after rotary positions; peft's `AdaptedAttention`.

Shapes: `G` runs of one length, `P` tokens of each, `H` heads of K and V, `Q` query heads, `M` learned tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from peft_serve.adapters.primitives import Edit, GatedPrompt
from peft_serve.kernels.gated import AddGated, GatedKernels, Prompts
from peft_serve.kernels.subsets import Batch
from peft_serve.model.routing import Route
from peft_serve.model.terms.term import OtherKernels


class Part(Protocol):
    """Some adapters' tokens, and what they get beside their attention."""

    @property
    def is_projected(self) -> bool: ...

    def of(self, q_TQD: Tensor) -> Tensor:
        """What `add_` has to know of the queries."""
        ...

    def add_(self, y_T: Tensor, seen: Tensor) -> None:
        """Add to y, [T, Q, D] or [T, Q D], what these tokens get."""
        ...


@dataclass(frozen=True, slots=True)
class DirectPart:
    """The prompts that a kernel reads."""

    add: AddGated
    is_projected: bool

    def of(self, q_TQD: Tensor) -> Tensor:
        return q_TQD

    def add_(self, y_T: Tensor, seen: Tensor) -> None:
        self.add(y_T.view(seen.shape), seen)


@dataclass(frozen=True, slots=True)
class GatedPart:
    """Runs of one length whose adapters have prompts of one form."""

    batch: Batch
    keys_GHMD: Tensor
    values_GHMD: Tensor
    gate_G111: Tensor
    is_projected: bool

    def of(self, q_TQD: Tensor) -> Tensor:
        """What these tokens get beside their attention, [G P, Q, D]."""
        q_GPQD = self.batch.take(q_TQD)
        num_runs, num_places, num_queries, size = q_GPQD.shape
        num_heads = self.keys_GHMD.shape[1]
        by_head = q_GPQD.view(num_runs, num_places, num_heads, -1, size).transpose(1, 2).flatten(2, 3)
        scores = by_head @ self.keys_GHMD.transpose(2, 3) * size**-0.5
        weights = self.gate_G111 * torch.softmax(scores, dim=-1, dtype=torch.float32).to(scores.dtype)
        out = (weights @ self.values_GHMD).view(num_runs, num_heads, num_places, -1, size)
        return out.transpose(1, 2).reshape(-1, num_queries, size)

    def add_(self, y_T: Tensor, seen: Tensor) -> None:
        self.batch.subset.add_(y_T, seen.reshape(len(seen), *y_T.shape[1:]))


@dataclass(frozen=True, slots=True)
class _Direct:
    """The prompts that a kernel has, and of which slots."""

    prompts: Prompts
    slots: set[int]


class GatedPrompts:
    """The prompts of the installed adapters at one attention."""

    def __init__(self, path: str, like: Tensor, *, head_dim: int, num_heads: int) -> None:
        self._path = path
        self._like = like
        self._head_dim = head_dim
        self._num_heads = num_heads
        self._prompts: dict[int, GatedPrompt] = {}
        self._kernel: GatedKernels | None = None
        self._direct: dict[bool, _Direct] = {}  # by whether what they give is projected

    def use_others(self, kernels: OtherKernels) -> None:
        """Run by a kernel from now on, where it can. No adapter is here yet."""
        if kernels.gated is not None and kernels.gated.serves(self._like):
            self._kernel = kernels.gated

    def put(self, slot: int, edit: Edit) -> None:
        """Raises ValueError for keys that do not fit the attention's heads."""
        if not isinstance(edit, GatedPrompt):
            return
        num_heads, _, head_dim = edit.keys_HPD.shape
        if head_dim != self._head_dim or not num_heads or self._num_heads % num_heads:
            raise ValueError(
                f"{self._path}.keys has {num_heads} heads of size {head_dim}; the site's {self._num_heads} query "
                f"heads of size {self._head_dim} cannot read them"
            )
        if self._kernel is not None:
            self._put_by(self._kernel, slot, edit)
            return
        keys, values, gate = (t.to(self._like.device) for t in (edit.keys_HPD, edit.values_HPD, edit.gate))
        self._prompts[slot] = GatedPrompt(keys, values, gate, edit.is_projected)

    def drop(self, slot: int) -> None:
        self._prompts.pop(slot, None)
        for direct in self._direct.values():
            direct.prompts.drop(slot)
            direct.slots.discard(slot)

    def _put_by(self, kernel: GatedKernels, slot: int, edit: GatedPrompt) -> None:
        if edit.is_projected not in self._direct:
            prompts = kernel.layer(self._num_heads, self._head_dim, self._like.dtype)
            self._direct[edit.is_projected] = _Direct(prompts, set())
        direct = self._direct[edit.is_projected]
        direct.prompts.put(slot, edit.keys_HPD, edit.values_HPD, edit.gate)
        direct.slots.add(slot)

    def op(self, route: Route) -> tuple[Part, ...]:
        """What the active prompts give."""
        direct = ((is_projected, its) for is_projected, its in self._direct.items() if its.slots & route.active)
        by_kernel = (DirectPart(its.prompts.op(route.segments), is_projected) for is_projected, its in direct)
        return (*by_kernel, *self._stacked(route))

    def _stacked(self, route: Route) -> tuple[GatedPart, ...]:
        """Those of one form and of runs of one length stacked."""
        by_form: dict[tuple[torch.Size, bool], set[int]] = {}
        for slot in route.active.intersection(self._prompts):
            prompt = self._prompts[slot]
            by_form.setdefault((prompt.keys_HPD.shape, prompt.is_projected), set()).add(slot)
        parts: list[GatedPart] = []
        for (_, is_projected), slots in by_form.items():
            for alike in route.batches(frozenset(slots)):
                prompts = [self._prompts[slot] for slot in alike.slots]
                keys, values = (
                    torch.stack(t) for t in ([p.keys_HPD for p in prompts], [p.values_HPD for p in prompts])
                )
                gate = torch.stack([p.gate for p in prompts])[:, :, None, None]
                route.keeps(keys, values, gate)
                parts.append(GatedPart(alike.batch, keys, values, gate, is_projected))
        return tuple(parts)
