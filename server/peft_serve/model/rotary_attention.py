"""An attention module with rotary positions, in three calls between its projections instead of some thirty.

The forwards of transformers turn queries and keys by nine tensor operations, and hand them on through a registry. Where
a module is known to do that and nothing else, its queries and keys are turned and its keys and values stored by one
call of a kernel, and attention is asked for outright. Whether it is known is decided twice: its forward names nothing
but what such a forward needs, and a trial gives the same queries, the same blocks and the same result.

Shapes: `T` tokens, `H` query and `K` key/value heads, `D` head size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn

from peft_serve.kernels.row_ops import DTYPES, RowOps
from peft_serve.model.attend import Terms
from peft_serve.model.attention import Kind, Place, RaggedAttention, Work
from peft_serve.model.pools import KVPool, KVShape
from peft_serve.model.ragged import Cached, Span, plan_self

Forward = Callable[..., Any]

_PARTS: Final = ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")
_SHAPES: Final = ("shape", "head_dim", "view", "transpose", "reshape", "contiguous")
_CALL: Final = ("ALL_ATTENTION_FUNCTIONS", "get_interface", "_attn_implementation", "eager_attention_forward", "update")
_FACTS: Final = ("config", "getattr", "layer_idx", "training", "attention_dropout", "scaling", "sliding_window")
_NAMES: Final = frozenset((*_PARTS, *_SHAPES, *_CALL, *_FACTS, "apply_rotary_pos_emb"))
"""What the forward of such a module names: one that names more does more."""
_NEEDED: Final = frozenset({"q_proj", "k_proj", "v_proj", "o_proj", "apply_rotary_pos_emb"})
_TOLERANCES: Final = {torch.float32: 1e-5, torch.bfloat16: 1e-2}  # of the largest number
_FAR: Final = 1_000_003  # a position that changes what depends on it


class RotaryAttention:
    """The forward of one module."""

    def __init__(self, module: nn.Module, attention: RaggedAttention, ops: RowOps, terms: Terms) -> None:
        parts: Any = module
        self._module = module
        self._own: Forward = partial(type(module).forward, module)
        self._q, self._k, self._v, self._o = parts.q_proj, parts.k_proj, parts.v_proj, parts.o_proj
        self._norms: tuple[Any, Any] | None = (parts.q_norm, parts.k_norm) if hasattr(parts, "q_norm") else None
        self.head = int(parts.head_dim)
        self._dtype: torch.dtype = parts.q_proj.weight.dtype
        self.layer = attention.place(module).layer
        self._attention = attention
        self._ops = ops
        self.terms = terms

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: object = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """As the module's own; where a pass asks for something unusual, it is the module's own."""
        work = self._attention.work(Kind.SELF)
        if not self.serves(work, position_embeddings, past_key_values):
            given: tuple[Tensor, None] = self._own(
                hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                **kwargs,
            )
            return given
        assert work is not None and position_embeddings is not None, "`serves` has seen them"  # noqa: PT018
        return self._o.forward(self._attended(hidden_states, position_embeddings, work)), None

    def serves(self, work: Work | None, angles: tuple[Tensor, Tensor] | None, cache: object) -> bool:
        """Whether a pass asks for nothing but what is known here."""
        if work is None or work.pool is None or work.plan.writes_T is None or angles is None or cache is not None:
            return False
        cosines = angles[0]
        return cosines.shape[-1] == self.head and cosines.shape[0] == 1 and cosines.dtype is self._dtype

    def _attended(self, x_1TI: Tensor, angles: tuple[Tensor, Tensor], work: Work) -> Tensor:
        assert work.pool is not None and work.plan.writes_T is not None, "`serves` has seen them"  # noqa: PT018
        num_tokens, head = x_1TI.shape[1], self.head
        # The projections' results are new tensors: they may be turned where they are.
        q = self._q.forward(x_1TI).view(num_tokens, -1, head)
        k = self._k.forward(x_1TI).view(num_tokens, -1, head)
        v = self._v.forward(x_1TI).view(num_tokens, -1, head)
        if self._norms is not None:
            q, k = (norm.forward(x[None])[0] for norm, x in zip(self._norms, (q, k), strict=True))
        cosines, sines = angles
        even = cosines.contiguous(), sines.contiguous()
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        self._ops.rotate_and_store(q, k, v, even, work.plan.writes_T, work.pool.layer(self.layer))
        out = self._attention.run(self._module, work, self.layer, q, k, v, self.terms)
        return out.reshape(1, num_tokens, -1)


@dataclass(frozen=True, slots=True)
class _Trial:
    """What came of a module's forward for two rows with a context."""

    out_1TI: Tensor
    q_THD: Tensor
    terms: Terms
    keys: Tensor
    values: Tensor

    def agrees(self, other: _Trial) -> bool:
        pairs = ((getattr(self, name), getattr(other, name)) for name in ("out_1TI", "q_THD", "keys", "values"))
        return self.terms == other.terms and all(_are_close(a, b) for a, b in pairs)


class _Listener:
    """A kernel that covers nothing and keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[Tensor, Terms]] = []

    def forget(self) -> None:
        """What was asked is what this is for."""

    def attend(self, _group: Cached, q_THD: Tensor, _pool: KVPool, _layer: int, terms: Terms) -> None:
        self.asked.append((q_THD.clone(), terms))


def rotary_attention(module: nn.Module, attention: RaggedAttention, ops: RowOps) -> RotaryAttention | None:
    """A shorter forward for this attention module, or None where it is not known to be one with rotary positions."""
    place = attention.place(module)
    if not _looks_rotary(module) or place.kind is not Kind.SELF or place.bias is not None:
        return None
    with torch.inference_mode():
        own = _try(partial(type(module).forward, module), module, attention, place)
        if own is None:
            return None
        shorter = RotaryAttention(module, attention, ops, own.terms)
        ours = _try(shorter.forward, module, attention, place)
    return shorter if ours is not None and ours.agrees(own) else None


def _looks_rotary(module: nn.Module) -> bool:
    code = getattr(type(module).forward, "__code__", None)
    names = frozenset(code.co_names) if code is not None else frozenset()
    projections = [getattr(module, name, None) for name in _PARTS[:4]]
    return (
        names >= _NEEDED
        and names <= _NAMES
        and ("q_norm" in names) == ("k_norm" in names) == hasattr(module, "q_norm")
        and ("q_norm" not in names or _is_by_head(module))
        and isinstance(getattr(module, "head_dim", None), int)
        and all(type(part) is nn.Linear and _is_served(part.weight) for part in projections)
        and not any(part._forward_hooks or part._forward_pre_hooks for part in module.children())
    )


def _is_served(weight: Tensor) -> bool:
    return weight.dtype in DTYPES and weight.device.type == "cpu"


def _is_by_head(module: Any) -> bool:
    """Whether queries and keys are normed head by head."""
    sizes = [tuple(norm.weight.shape) for norm in (module.q_norm, module.k_norm) if hasattr(norm, "weight")]
    return sizes == [(module.head_dim,)] * 2


def _try(forward: Forward, module: Any, attention: RaggedAttention, place: Place) -> _Trial | None:
    """Two rows of one new token each, over random keys and values of a pool of their own."""
    generator = torch.Generator().manual_seed(0)
    head, size, dtype = module.head_dim, module.q_proj.in_features, module.q_proj.weight.dtype
    shape = KVShape(num_layers=place.layer + 1, num_heads=module.k_proj.out_features // head, head_dim=head)
    pool = KVPool(shape, num_blocks=3, block_size=8, dtype=dtype, device=torch.device("cpu"))
    keys, values = pool.layer(place.layer)
    for tensor in (keys, values):
        tensor.copy_(torch.randn(tensor.shape, generator=generator))
    spans = [Span(num_tokens=1, start=3, blocks=(1,)), Span(num_tokens=1, start=5, blocks=(2,))]
    x_1TI = torch.randn(1, 2, size, generator=generator).to(dtype)
    cosines, sines = (torch.randn(1, 2, head, generator=generator).to(dtype) for _ in range(2))
    plan = plan_self(spans, block_size=8, device=pool.device)
    with _listening(attention) as listener, attention.running({Kind.SELF: Work(plan=plan, pool=pool)}):
        out = forward(
            x_1TI,
            position_embeddings=(cosines, sines),
            attention_mask=None,
            position_ids=torch.tensor([[_FAR, 2 * _FAR]]),
        )[0]
    if len(listener.asked) != 1:
        return None
    return _Trial(out, *listener.asked[0], keys, values)


@contextmanager
def _listening(attention: RaggedAttention) -> Iterator[_Listener]:
    kernel, attention.paged = attention.paged, _Listener()
    try:
        yield attention.paged
    finally:
        attention.paged = kernel


def _are_close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and float((a - b).abs().max()) <= _TOLERANCES[a.dtype] * float(b.abs().max())
