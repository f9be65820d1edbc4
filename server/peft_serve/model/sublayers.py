"""Sublayer sites: where adapters act on a residual sublayer as a whole, or on what enters the first layer.

A sublayer is h = f(t) and then N(h + t), or h + t where the model norms before and not after. The site changes h for
an adapter's own tokens; it sees t at the module that the residual enters, and N at its own. The model's modules are
wrapped while some installed adapter has a part here, and are themselves at all other times. A wrapped module's
forward may be another site's: that one runs inside.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peft_serve.adapters.base import SiteKind
from peft_serve.adapters.primitives import Edit, mapped
from peft_serve.adapters.sublayer_primitives import Bottleneck, Coupling, Reads, TwoLayers
from peft_serve.kernels.subsets import Tokens
from peft_serve.model.interventions import InterventionSite
from peft_serve.model.routing import Lane, Route
from peft_serve.model.sites_forward import expect_tokens
from peft_serve.model.sublayer_places import Around
from peft_serve.model.terms.bottlenecks import Bottlenecks, Part, activation_of
from peft_serve.model.terms.term import OtherKernels, Term

Forward = Callable[..., Any]
_FROM_RESIDUAL = frozenset({Reads.RESIDUAL, Reads.SUMMED, Reads.NORMED})


class Wrapping:
    """One module's forward under another, until it is undone. Undo in the reverse order."""

    def __init__(self, module: nn.Module, around: Forward) -> None:
        self.inner: Forward = module.forward
        self._module = module
        self._before = module.__dict__.get("forward")
        module.__dict__["forward"] = around

    def undo(self) -> None:
        if self._before is None:
            del self._module.__dict__["forward"]
        else:
            self._module.__dict__["forward"] = self._before


class SublayerSite:
    """The output of a residual sublayer, with the bottlenecks that installed adapters have there."""

    def __init__(self, around: Around, lane: Lane, like: Tensor) -> None:
        self.lane = lane
        self.terms: tuple[Term, ...] = (self,)
        self._around = around
        self._bottlenecks = Bottlenecks(like)
        self._output: Wrapping | None = None
        self._residual: Wrapping | None = None
        self._norm: Wrapping | None = None
        self._planned: Route | None = None
        self._parts: tuple[Part, ...] = ()
        self._residual_TD: Tensor | None = None
        self._finals: list[tuple[Tokens, Tensor]] = []

    def use_others(self, kernels: OtherKernels) -> None:
        if kernels.bottlenecks is not None:
            self._bottlenecks.use(kernels.bottlenecks)

    def put(self, slot: int, edit: Edit) -> None:
        if isinstance(edit, Bottleneck):
            self._bottlenecks.put(slot, edit)
            if self._output is None:
                self._wrap()

    def drop(self, slot: int) -> None:
        self._bottlenecks.drop(slot)
        if not self._bottlenecks:
            self._unwrap()

    def forget(self) -> None:
        self._planned, self._parts = None, ()

    def close(self) -> None:
        """Leave the model's modules as they were."""
        self._bottlenecks.clear()
        self._unwrap()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The forward of the sublayer's output module, around its own."""
        assert self._output is not None, "called where it is wrapped"
        given = self._output.inner(*args, **kwargs)
        parts = self._active()
        if not parts:
            return given
        output = given if isinstance(given, Tensor) else given[0]
        changed = self._changed(output, parts)
        return changed if isinstance(given, Tensor) else (changed, *given[1:])

    def is_between(self, residual: nn.Module, output: nn.Module) -> bool:
        """Whether its sublayer is from what enters the one module to what leaves the other, with no norm behind."""
        around = self._around
        return around.residual is residual and around.output is output and around.norm is None

    def change_(self, output_TD: Tensor, residual_TD: Tensor) -> None:
        """Change the sublayer's output in place, for a layer whose modules are not called."""
        parts = self._active()
        if parts:
            self._residual_TD = residual_TD
            output_TD.copy_(self._changed(output_TD, parts))

    def _wrap(self) -> None:
        around = self._around
        assert around.output is not None, "a sublayer has an output"
        if around.norm is not None:
            self._norm = Wrapping(around.norm, self._leave)
        self._output = Wrapping(around.output, self.forward)
        self._residual = Wrapping(around.residual, self._enter)

    def _unwrap(self) -> None:
        for wrapping in (self._residual, self._output, self._norm):
            if wrapping is not None:
                wrapping.undo()
        self._residual = self._output = self._norm = None
        self._residual_TD = None
        self.forget()

    def _active(self) -> tuple[Part, ...]:
        route = self.lane.route
        if route is None:
            return ()
        if route is not self._planned:
            self._parts, self._planned = self._bottlenecks.parts(route), route
        return self._parts

    def _enter(self, *args: Any, **kwargs: Any) -> Any:
        """Around the module that the residual enters."""
        assert self._residual is not None, "called where it is wrapped"
        self._finals.clear()  # of a pass that broke off in between, if any
        if self._active():
            residual = _first(args, kwargs)
            self._residual_TD = residual.reshape(-1, residual.shape[-1])
        return self._residual.inner(*args, **kwargs)

    def _leave(self, x: Tensor) -> Tensor:
        """Around the norm behind the addition, where results that are final take their place."""
        assert self._norm is not None, "called where it is wrapped"
        normed: Tensor = self._norm.inner(x)
        if self._finals:
            normed = normed.clone()
            for subset, result in self._finals:
                subset.put_(normed.view(-1, normed.shape[-1]), result)
            self._finals.clear()
        return normed

    def _changed(self, output: Tensor, parts: tuple[Part, ...]) -> Tensor:
        assert self._planned is not None, "parts belong to a route"
        h_TD = output.reshape(-1, output.shape[-1])
        expect_tokens(self._around.spec.path, h_TD.shape[0], self._planned.num_tokens)
        streams = self._streams(output, h_TD, parts)
        changed_TD = h_TD.clone()
        for part in parts:
            result = part.of(streams)
            if part.is_final and self._norm is not None:
                self._finals.append((part.subset, result))
                continue
            if part.is_final:  # the model adds the residual once more
                assert self._residual_TD is not None, "the residual comes before the output"
                result = result - part.subset.take(self._residual_TD)
            part.subset.put_(changed_TD, result)
        self._residual_TD = None
        return changed_TD.view(output.shape)

    def _streams(self, output: Tensor, h_TD: Tensor, parts: tuple[Part, ...]) -> dict[Reads, Tensor]:
        """The streams that the parts look at, [T, D] each."""
        wanted = frozenset().union(*(part.streams for part in parts))
        streams = {Reads.SUBLAYER: h_TD}
        if wanted.isdisjoint(_FROM_RESIDUAL):
            return streams
        assert self._residual_TD is not None, "the residual comes before the output"
        streams[Reads.RESIDUAL] = self._residual_TD
        streams[Reads.SUMMED] = streams[Reads.NORMED] = h_TD + self._residual_TD
        if self._norm is not None and Reads.NORMED in wanted:
            streams[Reads.NORMED] = self._norm.inner(streams[Reads.SUMMED].view(output.shape)).reshape(h_TD.shape)
        return streams


class CouplingSite:
    """What enters the first layer, with the couplings that installed adapters have there."""

    def __init__(self, around: Around, lane: Lane, like: Tensor) -> None:
        self.lane = lane
        self.terms: tuple[Term, ...] = (self,)
        self._around = around
        self._like = like
        self._edits: dict[int, Coupling] = {}
        self._wrapping: Wrapping | None = None

    def put(self, slot: int, edit: Edit) -> None:
        if isinstance(edit, Coupling):
            if self._wrapping is None:
                self._wrapping = Wrapping(self._around.residual, self.forward)
            self._edits[slot] = mapped(edit, lambda tensor: tensor.to(self._like))

    def drop(self, slot: int) -> None:
        if self._edits.pop(slot, None) is not None and not self._edits:
            self.close()

    def forget(self) -> None:
        """Nothing is gathered for a route."""

    def close(self) -> None:
        """Leave the model's modules as they were."""
        self._edits.clear()
        if self._wrapping is not None:
            self._wrapping.undo()
            self._wrapping = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The forward of the first layer, around its own."""
        assert self._wrapping is not None, "called where it is wrapped"
        inner = self._wrapping.inner
        route = self.lane.route
        parts = () if route is None else route.personal(self._edits)
        if route is None or not parts:
            return inner(*args, **kwargs)
        x = _first(args, kwargs)
        changed = x.clone()
        changed_TD = changed.view(-1, x.shape[-1])
        expect_tokens(self._around.spec.path, changed_TD.shape[0], route.num_tokens)
        for one in parts:
            one.tokens.put_(changed_TD, _coupled(self._edits[one.slot], one.tokens.take(changed_TD)))
        if args:
            return inner(changed, *args[1:], **kwargs)
        return inner(**{**kwargs, next(iter(kwargs)): changed})


def _coupled(edit: Coupling, x_ND: Tensor) -> Tensor:
    num_left = edit.left.second_OB.shape[0]
    left, right = x_ND[:, :num_left], x_ND[:, num_left:]
    left = left + _two_layers(edit.left, right, edit.activation)
    right = right + _two_layers(edit.right, left, edit.activation)
    return torch.cat((left, right), dim=-1)


def _two_layers(net: TwoLayers, x_NI: Tensor, activation: str) -> Tensor:
    low_NB = activation_of(activation)(nn.functional.linear(x_NI, net.first_BI, net.first_bias_B))
    return nn.functional.linear(low_NB, net.second_OB, net.second_bias_O)


def _first(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    first = args[0] if args else next(iter(kwargs.values()))
    assert isinstance(first, Tensor), "the stream is the first thing a module is given"
    return first


def bind_sublayer(around: Around, lane: Lane, like: Tensor) -> SublayerSite | CouplingSite | InterventionSite:
    """The site of a sublayer, of what enters the first layer, or of what leaves a layer."""
    if around.output is None:
        return CouplingSite(around, lane, like)
    if around.spec.kind is SiteKind.LAYER:
        return InterventionSite(around.spec, around.output, lane, like)
    return SublayerSite(around, lane, like)


def close_sublayer(site: object) -> None:
    """Take a sublayer's site off the model."""
    assert isinstance(site, SublayerSite | CouplingSite | InterventionSite), "sublayers are bound by `bind_sublayer`"
    site.close()
