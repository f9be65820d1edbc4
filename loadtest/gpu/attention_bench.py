"""Attention at the heads of the 8 B shape: our kernel and torch's ways in turns, against the ceilings of this call.

A decode step reads every key and value of its context once; a prompt does its products once. Plain torch gathers the
keys and values of a step's rows and calls its own attention. `varlen` is torch's attention over rows of any length:
over blocks where it reads them (FlashAttention-3), and over keys that lie side by side, which somebody would have had
to put there; the latter is also what our kernel's numbers are held against.
"""

from dataclasses import dataclass
from typing import Final

import torch
from torch import nn

from loadtest.gpu.facts import ceilings
from loadtest.gpu.ground import Ground
from loadtest.gpu.kernels import kernels_for
from loadtest.gpu.results import Figures, Found, Value
from loadtest.gpu.timing import Act, KernelTime, kernels_in_turns
from loadtest.gpu.varlen import side_by_side
from peft_serve.kernels.varlen import NoVarlen, Varlen, open_varlen
from peft_serve.model.attend import Terms
from peft_serve.model.attention import Kind, Place, RaggedAttention, Work
from peft_serve.model.pools import KVPool, KVShape
from peft_serve.model.ragged import Span, plan_self
from peft_serve.model.triton_attention import PlanAttention
from peft_serve.model.varlen_attention import VarlenPlans

BLOCK_SIZE: Final = 16
_EACH_S: Final = 3.0
_NEEDS_S: Final = 4.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Heads:
    """Query heads, key/value heads, and their size."""

    num: int = 32
    num_kv: int = 8
    size: int = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """Rows that decode behind a context, or that compute a prompt from its beginning."""

    num_rows: int
    context: int
    num_tokens: int = 1
    heads: Heads = Heads()

    @property
    def what(self) -> str:
        """As the table says it."""
        return f"decode {self.num_rows}" if self.num_tokens == 1 else f"prompt {self.num_rows} of {self.num_tokens}"


POINTS: Final = (
    Point(num_rows=32, context=512),
    Point(num_rows=32, context=4096),
    Point(num_rows=1, context=8192),
    Point(num_rows=4, context=0, num_tokens=1024),
    Point(num_rows=1, context=4096, num_tokens=512),
)
_QUICK: Final = (Point(num_rows=2, context=20, heads=Heads(num=4, num_kv=2, size=16)),)


@torch.inference_mode()
def attention(ground: Ground) -> Found:
    """One row of the table for each point."""
    rows: list[tuple[Value, ...]] = []
    varlen, why_not = _varlen(ground)
    try:
        for point in _QUICK if ground.is_quick else POINTS:
            if rows and ground.left_s < _NEEDS_S:
                break
            rows.append(_measured(ground, point, varlen))
    finally:
        if varlen is not None:
            varlen.close()
    columns = (
        *("step", "context", "kernel us", "spread", "launch us", "plain torch us", "bound us"),
        *("kernel over bound", "plain over kernel", "varlen over blocks us", "varlen side by side us", "differs by"),
    )
    heads = POINTS[0].heads
    notes = [f"{heads.num} heads over {heads.num_kv} of {heads.size}; launch is the host's time for a call"]
    notes += [f"varlen over blocks: {why_not}"] if why_not else []
    figures = Figures(title="Attention, one layer", columns=columns, rows=tuple(rows), notes=tuple(notes))
    return Found(figures=(figures,))


def _varlen(ground: Ground) -> tuple[Varlen | None, str]:
    """torch's attention over blocks, or why it is not there."""
    try:
        return open_varlen(ground.device), ""
    except NoVarlen as reason:
        return None, str(reason)


def _measured(ground: Ground, point: Point, varlen: Varlen | None) -> tuple[Value, ...]:
    rates, dtype = ceilings(ground), torch.bfloat16 if ground.is_gpu else torch.float32
    acts = _acts(ground, point, dtype, varlen)
    differs = _difference(acts["kernel"](), acts["side by side"]()) if "side by side" in acts else None
    took = kernels_in_turns(ground, acts, most_s=_EACH_S)
    heads, read = point.heads, point.context + point.num_tokens
    num_bytes = 2 * point.num_rows * read * heads.num_kv * heads.size * dtype.itemsize
    attended = point.num_rows * (point.num_tokens * point.context + point.num_tokens * (point.num_tokens + 1) // 2)
    bound_s = max(num_bytes / rates.bytes_per_s, 4 * heads.num * heads.size * attended / rates.flops_per_s)
    ours, plain = took["kernel"], took["plain torch"]
    return (
        *(point.what, point.context, 1e6 * ours.device.median_s, ours.device.words, 1e6 * ours.host.median_s),
        *(1e6 * plain.device.median_s, 1e6 * bound_s, ours.device.median_s / bound_s),
        plain.device.median_s / ours.device.median_s,
        *(_micro(took.get(name)) for name in ("over blocks", "side by side")),
        differs,
    )


def _difference(ours: object, theirs: object) -> float:
    """The largest, over the largest number."""
    assert isinstance(ours, torch.Tensor)
    assert isinstance(theirs, torch.Tensor)
    return float((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max())


def _micro(took: KernelTime | None) -> float | None:
    return None if took is None else 1e6 * took.device.median_s


def _acts(ground: Ground, point: Point, dtype: torch.dtype, varlen: Varlen | None) -> dict[str, Act]:
    device, heads = ground.device, point.heads
    each = -(-(point.context + point.num_tokens) // BLOCK_SIZE)
    facts = KVShape(num_layers=1, num_heads=heads.num_kv, head_dim=heads.size)
    pool = KVPool(facts, num_blocks=1 + point.num_rows * each, block_size=BLOCK_SIZE, dtype=dtype, device=device)
    spans = [
        Span(num_tokens=point.num_tokens, start=point.context, blocks=tuple(range(1 + i * each, 1 + (i + 1) * each)))
        for i in range(point.num_rows)
    ]
    plan = plan_self(spans, block_size=BLOCK_SIZE, device=device)
    num_tokens = point.num_rows * point.num_tokens
    each_num = (heads.num, heads.num_kv, heads.num_kv)
    q, k, v = (torch.randn(num_tokens, n, heads.size, device=device).to(dtype) for n in each_num)
    terms = Terms(scaling=heads.size**-0.5)
    ours, module, work = PlanAttention(kernels_for(ground).attention), nn.Identity(), Work(plan=plan, pool=pool)
    plain = RaggedAttention({module: Place(kind=Kind.SELF, layer=0)})
    if ours.attend(plan, pool, q, k, v, 0, terms) is None:
        raise RuntimeError("the kernel leaves these heads to torch")
    acts: dict[str, Act] = {
        "kernel": lambda: ours.attend(plan, pool, q, k, v, 0, terms),
        "plain torch": lambda: plain.run(module, work, 0, q, k, v, terms),
    }
    if varlen is not None:
        theirs = VarlenPlans(varlen.attend)
        acts["over blocks"] = lambda: theirs.attend(plan, pool, q, k, v, 0, terms)
    gathered = side_by_side(plan, pool, q, terms)
    if gathered is not None:
        acts["side by side"] = gathered
    return acts
