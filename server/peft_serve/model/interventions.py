"""Layer sites: what leaves a layer as a whole, edited where installed adapters have interventions.

The layer is hooked while some installed adapter intervenes there, and is itself at all other times. Which tokens
are edited follows from the extents of the route; without them nothing is.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from peft_serve.adapters.base import SiteSpec
from peft_serve.adapters.primitives import Edit, mapped
from peft_serve.adapters.sublayer_primitives import Intervention
from peft_serve.model.routing import Lane, Route
from peft_serve.model.sites_forward import expect_tokens
from peft_serve.model.terms.interventions import InterventionPart, parts_of
from peft_serve.model.terms.term import Term


class InterventionSite:
    """The hidden states that leave one layer."""

    def __init__(self, spec: SiteSpec, layer: nn.Module, lane: Lane, like: Tensor) -> None:
        self.lane = lane
        self.terms: tuple[Term, ...] = (self,)
        self._spec = spec
        self._layer = layer
        self._like = like
        self._edits: dict[int, Intervention] = {}
        self._hook: RemovableHandle | None = None
        self._planned: Route | None = None
        self._parts: tuple[InterventionPart, ...] = ()

    def put(self, slot: int, edit: Edit) -> None:
        if isinstance(edit, Intervention):
            if self._hook is None:
                self._hook = self._layer.register_forward_hook(self._leave)
            self._edits[slot] = mapped(edit, lambda tensor: tensor.to(self._like))

    def drop(self, slot: int) -> None:
        if self._edits.pop(slot, None) is not None and not self._edits:
            self.close()

    def forget(self) -> None:
        self._planned, self._parts = None, ()

    def close(self) -> None:
        """Leave the layer as it was."""
        self._edits.clear()
        self.forget()
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def forward(self, given: Any) -> Any:
        """What the layer gave, edited: its hidden states, or a tuple that begins with them."""
        parts = self._active()
        if not parts:
            return given
        states = given if isinstance(given, Tensor) else given[0]
        edited = self._edited(states, parts)
        return edited if isinstance(given, Tensor) else (edited, *given[1:])

    def _leave(self, _layer: nn.Module, _args: object, given: Any) -> Any:
        return self.forward(given)

    def _active(self) -> tuple[InterventionPart, ...]:
        route = self.lane.route
        if route is None:
            return ()
        if route is not self._planned:
            self._parts, self._planned = parts_of(self._edits, route), route
        return self._parts

    def _edited(self, states: Tensor, parts: tuple[InterventionPart, ...]) -> Tensor:
        assert self._planned is not None, "parts belong to a route"
        x_TD = states.reshape(-1, states.shape[-1])
        expect_tokens(self._spec.path, x_TD.shape[0], self._planned.num_tokens)
        edited_TD = x_TD.clone()
        for part in parts:
            part.targets.put_(edited_TD, part.of(x_TD))
        return edited_TD.view(states.shape)
