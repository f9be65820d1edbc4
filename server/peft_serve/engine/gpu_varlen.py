"""Whether torch's attention over blocks takes the place of our own on this GPU: a trial at start decides.

It has to be there, to be right, and to be faster with the base's own heads, in a decode step and in a prompt: rows of
both kinds share steps, and one that is computed now by this kernel and now by that one would have other bits now and
then. Nothing is chosen anew while requests run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Final

import torch
from torch import Tensor

from peft_serve.kernels.varlen import DTYPES, NoVarlen, Varlen, open_varlen
from peft_serve.model.attend import Terms
from peft_serve.model.attention import PlanKernel
from peft_serve.model.base import ResidentBase
from peft_serve.model.pools import KVPool, KVShape
from peft_serve.model.ragged import Plan, Span, plan_self
from peft_serve.model.varlen_attention import FirstThatCan, VarlenPlans

Act = Callable[[], object]

_BLOCK_SIZE: Final = 16
_STEPS: Final[Mapping[str, tuple[int, int, int]]] = {
    "decode": (32, 1, 1023),
    "a prompt": (2, 512, 512),
}
"""Rows, tokens of each, and the context before them."""

_TOLERANCE: Final = 2e-2  # of the largest number, as for our own kernels in bfloat16
_ROUNDS: Final = 7


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """Rows with random keys and values."""

    plan: Plan
    pool: KVPool
    q: Tensor
    k: Tensor
    v: Tensor
    terms: Terms

    def by(self, kernel: PlanKernel) -> Tensor | None:
        """What a kernel makes of it."""
        return kernel.attend(self.plan, self.pool, self.q, self.k, self.v, 0, self.terms)


def choose_attention(
    base: ResidentBase,
    ours: PlanKernel,
    say: Callable[[str], None],
    *,
    load: Callable[[torch.device], Varlen] = open_varlen,
    seconds: Callable[[Act], float] | None = None,
    steps: Mapping[str, tuple[int, int, int]] = _STEPS,
) -> PlanKernel:
    """Our kernel, or torch's before it. `load` may raise `NoVarlen`; `seconds` times a call on the device; `steps` are
    those of the trial."""
    if base.dtype not in DTYPES or not base.runs.cache.num_layers:
        return ours
    try:
        varlen = load(base.device)
    except NoVarlen:
        return ours
    theirs = VarlenPlans(varlen.attend)
    try:
        with torch.cuda.device(base.device) if base.device.type == "cuda" else nullcontext():
            reason = _reason_against(base, ours, theirs, seconds or device_seconds, steps)
    except Exception as problem:  # noqa: BLE001  # somebody else's kernel, which a server can do without
        reason = f"it cannot be tried out ({type(problem).__name__}: {problem})"
    if reason is None:
        say("attention over blocks runs by torch's own kernel (FlashAttention-3): right here, and faster than ours")
        return FirstThatCan((theirs, ours))
    varlen.close()
    say(f"torch's own attention over blocks is not used: {reason}")
    return ours


def device_seconds(act: Act) -> float:
    """The median of a few calls, by the device's own clock."""
    act()
    took: list[float] = []
    for _ in range(_ROUNDS):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        first.record()
        act()
        last.record()
        last.synchronize()
        took.append(first.elapsed_time(last) / 1e3)
    return median(took)


@torch.inference_mode()
def _reason_against(
    base: ResidentBase,
    ours: PlanKernel,
    theirs: PlanKernel,
    seconds: Callable[[Act], float],
    steps: Mapping[str, tuple[int, int, int]],
) -> str | None:
    for name, (num_rows, num_tokens, context) in steps.items():
        step = _step(base, num_rows, num_tokens, context)
        own, other = step.by(ours), step.by(theirs)
        if own is None or other is None:
            return f"{'ours' if own is None else 'it'} does not cover heads like the base's"
        error = float((own.double() - other.double()).abs().max() / own.double().abs().max())
        if not error <= _TOLERANCE:
            return f"{name} comes out otherwise, by {error:.1e} of the largest number"
        ours_s, theirs_s = (seconds(partial(step.by, kernel)) for kernel in (ours, theirs))
        ours.forget()
        theirs.forget()
        if theirs_s >= ours_s:
            return f"{name} takes it {theirs_s / ours_s:.2f} times as long"
    return None


def _step(base: ResidentBase, num_rows: int, num_tokens: int, context: int) -> Step:
    generator = torch.Generator(base.device).manual_seed(4)
    head, kv_heads, device = base.runs.cache.head_dim, base.runs.cache.num_heads, base.device

    def drawn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device).to(base.dtype)

    each = -(-(context + num_tokens) // _BLOCK_SIZE)
    facts = KVShape(num_layers=1, num_heads=kv_heads, head_dim=head)
    num_blocks = 1 + num_rows * each
    pool = KVPool(facts, num_blocks=num_blocks, block_size=_BLOCK_SIZE, dtype=base.dtype, device=device)
    spans = [
        Span(num_tokens=num_tokens, start=context, blocks=tuple(range(1 + row, num_blocks, num_rows)))
        for row in range(num_rows)
    ]
    past = torch.arange(_BLOCK_SIZE, num_blocks * _BLOCK_SIZE, device=device)
    pool.write(0, past, drawn(len(past), kv_heads, head), drawn(len(past), kv_heads, head))
    plan = plan_self(spans, block_size=_BLOCK_SIZE, device=device)
    q, k, v = (drawn(num_rows * num_tokens, n, head) for n in (base.shape.num_heads, kv_heads, kv_heads))
    assert plan.writes_T is not None, "rows of blocks write theirs"
    pool.write(0, plan.writes_T, k, v)
    return Step(plan=plan, pool=pool, q=q, k=k, v=v, terms=Terms(scaling=head**-0.5))
