"""The adapter's own parameters in place of the base's: of a dense site, and of a norm."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping

from torch import Tensor, nn
from torch.nn.functional import embedding, layer_norm, linear, rms_norm

from peft_serve.adapters.base import SiteKind, SiteSpec
from peft_serve.adapters.primitives import Edit, Replace
from peft_serve.kernels.row_ops import Norm, RowOps
from peft_serve.model.quantised import is_quantised
from peft_serve.model.routing import Personal, Route
from peft_serve.model.terms.tables import SlotTable
from peft_serve.model.terms.term import OwnOp


class OwnParameters:
    """The adapter's own weight and bias instead of the base's, on its own tokens."""

    def __init__(self, spec: SiteSpec, module: nn.Module) -> None:
        self._spec = spec
        self._module = module
        self._states: dict[int, dict[str, Tensor]] = {}

    def put(self, slot: int, edit: Edit) -> None:
        if isinstance(edit, Replace):
            if is_quantised(self._module):
                raise ValueError(f"'{self._spec.path}' is quantised; its parameters cannot be replaced")
            own = dict(self._module.named_parameters(recurse=False))
            self._states[slot] = {name: t.to(own[name]) for name, t in edit.state.items()}

    def drop(self, slot: int) -> None:
        self._states.pop(slot, None)

    @property
    def slots(self) -> Collection[int]:
        """Who has some here."""
        return self._states.keys()

    def parts(self, route: Route) -> tuple[Personal, ...]:
        """The tokens of those who are active, in the order of the tokens."""
        return route.personal(self._states)

    def of(self, slot: int, x: Tensor) -> Tensor:
        """The site's op with the slot's parameters where it has them, with the base's where not."""
        state = self._states[slot]
        weight = state.get("weight", self._module.weight)
        bias = state.get("bias", getattr(self._module, "bias", None))
        assert isinstance(weight, Tensor)
        if self._spec.kind is SiteKind.EMBEDDING:
            rows = embedding(x, weight)
            return rows if self._spec.embed_scale == 1.0 else rows * self._spec.embed_scale
        return linear(x, weight.t() if self._spec.kind is SiteKind.CONV1D else weight, bias)


class OwnNorm:
    """A tuned norm: every token is normalised with its adapter's parameters, all adapters at once.

    Where a kernel computes the base's norm, it computes these too, from a table of gains: tokens of others keep their
    bits. Else torch's own norms take the affine part apart; every other norm (RMS norms, with or without Gemma's 1 + w)
    is run as it is, on a twin whose parameters are one row for each token.
    """

    def __init__(self, module: nn.Module) -> None:
        parameters = dict(module.named_parameters(recurse=False))
        self._tables = {name: SlotTable(parameter.detach()) for name, parameter in parameters.items()}
        self._module = module
        self._twin = copy.copy(module)
        self._twin.__dict__.pop("forward", None)
        self._twin._parameters = dict(module._parameters)
        self._by_kernel: _KernelGains | None = None

    def run_by(self, norm: Norm, ops: RowOps) -> None:
        """Run by a kernel from now on. No adapter is here yet."""
        self._by_kernel = _KernelGains(norm, ops)

    def put(self, slot: int, edit: Edit) -> None:
        if not isinstance(edit, Replace):
            return
        if self._by_kernel is not None:
            self._by_kernel.put(slot, edit.state)
            return
        for name, vector in edit.state.items():
            self._tables[name].put(slot, vector)

    def drop(self, slot: int) -> None:
        if self._by_kernel is not None:
            self._by_kernel.table.drop(slot)
        for table in self._tables.values():
            table.drop(slot)

    def gains(self, route: Route) -> Tensor | None:
        """[S, D] What the kernel multiplies with by slot, or None if no active adapter has a norm of its own here."""
        by_kernel = self._by_kernel
        return None if by_kernel is None or by_kernel.table.index(route) is None else by_kernel.table.rows

    def op(self, route: Route) -> OwnOp | None:
        if self._by_kernel is not None:
            return self._by_kernel.op(route)
        indices = {name: table.index(route) for name, table in self._tables.items()}
        tables = {name: self._tables[name].rows for name, i in indices.items() if i is not None}
        if not tables:
            return None
        slot_T = route.slot_of_token
        return lambda x: self._run(x, {name: rows_SD[slot_T] for name, rows_SD in tables.items()})

    def _run(self, x: Tensor, own_TD: dict[str, Tensor]) -> Tensor:
        """x is [T, d], [1, T, d], or, where heads are normalised one by one, [1, T, heads, d] or [1, heads, T, d]."""
        shape = [1] * x.ndim
        axis = token_axis(x)
        shape[axis], shape[-1] = x.shape[axis], x.shape[-1]
        return self._apply(x, {name: t.view(shape) for name, t in own_TD.items()})

    def _apply(self, x: Tensor, own: dict[str, Tensor]) -> Tensor:
        parameters = {**self._module._parameters, **own}
        weight, bias = parameters.get("weight"), parameters.get("bias")
        if isinstance(self._module, (nn.LayerNorm, nn.RMSNorm)):
            y = _plain_norm(self._module, x)
            y = y if weight is None else y * weight
            return y if bias is None else y + bias
        self._twin._parameters.update(own)  # type: ignore[arg-type]  # plain tensors for the length of a call
        try:
            y = self._twin.forward(x)
        finally:
            self._twin._parameters.update(self._module._parameters)
        assert isinstance(y, Tensor)
        return y


class _KernelGains:
    """The gains of the installed adapters, as the kernel of the base's norm takes them."""

    def __init__(self, norm: Norm, ops: RowOps) -> None:
        self._norm = norm
        self._ops = ops
        self.table = SlotTable(norm.gain)

    def put(self, slot: int, state: Mapping[str, Tensor]) -> None:
        if "weight" in state:
            gain_D = state["weight"].to(self._norm.gain)
            self.table.put(slot, gain_D + self._norm.offset if self._norm.offset else gain_D)

    def op(self, route: Route) -> OwnOp | None:
        slot_T = self.table.index(route)
        if slot_T is None:
            return None
        norm = self._ops.own_rms_norm(self.table.rows, slot_T, self._norm.epsilon)

        def by_token(x: Tensor) -> Tensor:
            axis = token_axis(x)
            return norm(x.transpose(1, 2)).transpose(1, 2) if axis != 1 and x.ndim == 4 else norm(x)

        return by_token


def token_axis(x: Tensor) -> int:
    """Which axis of a norm's input counts tokens; see `OwnNorm`.

    Models split a projection into heads by a view and may then swap heads and tokens, which swaps the strides
    too: memory stays in the order of tokens.
    """
    if x.ndim < 4:
        return x.ndim - 2
    return 1 if x.stride(1) >= x.stride(2) else 2


def _plain_norm(module: nn.LayerNorm | nn.RMSNorm, x: Tensor) -> Tensor:
    shape = list(module.normalized_shape)
    if isinstance(module, nn.LayerNorm):
        return layer_norm(x, shape, eps=module.eps)
    return rms_norm(x, shape, eps=module.eps)
