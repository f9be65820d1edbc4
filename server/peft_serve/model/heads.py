"""Task heads at work: logits from last hidden states.

Owns the heads of the adapters in slots. A layer of a head runs from the adapter's own parameters where the adapter
has them; where not it is a module of the base, which is a site like any other, so that an adapter may act on it.
The table of heads by family is `adapters.heads`.

Shapes: `N` states, `d` their width, `L` labels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear
from transformers.activations import ACT2FN

from peft_serve.adapters.adapterhub.heads import flexible_form
from peft_serve.adapters.heads import HeadForm, forms_of, own_form
from peft_serve.adapters.paths import site_path
from peft_serve.adapters.primitives import Head, HeadTask
from peft_serve.model.base import ResidentBase
from peft_serve.model.routing import Stream


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedHead:
    """A head as a slot has it: `state` holds the layers that are not the base's modules."""

    task: HeadTask
    form: HeadForm
    state: Mapping[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadJob:
    """States of one slot for one head."""

    slot: int
    head: PlacedHead
    states_ND: Tensor


class Heads:
    """The heads of the base and of the adapters in slots."""

    def __init__(self, base: ResidentBase) -> None:
        self._base = base
        own = own_form(base)
        self._own = None if own is None else PlacedHead(task=own[0], form=own[1], state={})
        self._placed: dict[int, PlacedHead] = {}

    def put(self, slot: int, head: Head) -> None:
        """Keep an adapter's head. ValueError for one that was not compiled for this base."""
        family, is_encoder = self._base.family, self._base.shape.is_encoder
        flexible = flexible_form(head.task, head.state, is_encoder=is_encoder)
        forms = forms_of(family, head.task, is_encoder=is_encoder) if flexible is None else (flexible,)
        for form in forms:
            if all(f"{layer}.weight" in head.state or site_path(layer, self._base) for layer in form.layers):
                state = {name: t.to(device=self._base.device, dtype=self._base.dtype) for name, t in head.state.items()}
                self._placed[slot] = PlacedHead(task=head.task, form=form, state=state)
                return
        raise ValueError(f"the head {head.task} was not compiled for {family} models; compile it for this base")

    def drop(self, slot: int) -> None:
        self._placed.pop(slot, None)

    def of(self, slot: int, task: HeadTask) -> PlacedHead | None:
        """The slot's own head, else the base's, if it is one for this task."""
        head = self._placed.get(slot, self._own)
        return head if head is not None and head.task is task else None

    def run(self, jobs: Sequence[HeadJob]) -> list[Tensor]:
        """Float32 logits [N, L] of each job. Jobs come sorted by slot, as the rows of a step."""
        states = [job.states_ND for job in jobs]
        for depth in range(max((len(job.head.form.layers) for job in jobs), default=0)):
            self._run_layer(depth, jobs, states)
        return [x.float() for x in states]

    def _run_layer(self, depth: int, jobs: Sequence[HeadJob], states: list[Tensor]) -> None:
        """Replace the states of every job that has such a layer by what it gives."""
        by_module: dict[str, list[int]] = {}
        for i, job in enumerate(jobs):
            form = job.head.form
            if depth >= len(form.layers):
                continue
            layer = form.layers[depth]
            weight = job.head.state.get(f"{layer}.weight")
            if weight is None:
                by_module.setdefault(layer, []).append(i)
            else:
                states[i] = linear(states[i], weight, job.head.state.get(f"{layer}.bias"))
        for layer, members in by_module.items():
            self._run_module(layer, [jobs[i].slot for i in members], members, states)
        for i, job in enumerate(jobs):
            if depth < len(job.head.form.layers) - 1:
                states[i] = self._activation(job.head.form)(states[i])

    def _run_module(self, layer: str, slots: Sequence[int], members: Sequence[int], states: list[Tensor]) -> None:
        path = site_path(layer, self._base)
        assert path is not None, f"neither the base nor the adapter has the head's layer {layer}"
        lengths = [len(states[i]) for i in members]
        self._base.adapted.route(Stream.HEAD, list(zip(slots, lengths, strict=True)))
        y_NO = self._base.model.get_submodule(path)(torch.cat([states[i] for i in members]))
        for i, y in zip(members, torch.split(y_NO, lengths), strict=True):
            states[i] = y

    def _activation(self, form: HeadForm) -> Callable[[Tensor], Tensor]:
        name = form.activation
        if form.layers[0] == "pooler.dense":
            name = getattr(self._base.model.config, "pooler_hidden_act", None) or name
        function: Callable[[Tensor], Tensor] = ACT2FN[name]
        return function
