"""How a base on a GPU is made faster at start: attention and terms of adapters by Triton kernels of our own.

The one place that decides between them and plain torch, as `cpu_kernels` does for a CPU. It decides once, after the
kernels have computed a few numbers that are known otherwise; nothing is chosen anew while requests run. Triton is
imported here only where it is used: a machine without a GPU need not have it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Final, Literal

import torch
from torch import Tensor

from peft_serve.engine.gpu_eight_bits import eight_bit_kernel, eight_bits_error, run_by_kernel
from peft_serve.engine.gpu_terms import other_kernels, others_error
from peft_serve.engine.gpu_varlen import choose_attention
from peft_serve.kernels.capture import HeldTables
from peft_serve.kernels.low_rank import Segments
from peft_serve.model.attend import Terms, attend_reference
from peft_serve.model.base import ResidentBase
from peft_serve.model.pools import KVPool, KVShape
from peft_serve.model.ragged import Plan, Span, plan_self
from peft_serve.model.triton_attention import PlanAttention

if TYPE_CHECKING:
    from peft_serve.kernels.triton.attention import TiledAttention
    from peft_serve.kernels.triton.low_rank import LowRankKernel

Mode = Literal["auto", "on", "off"]

_TOLERANCES: Final = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
"""Of the largest number that comes out. Sums are float32, so the rounding of what goes in and out is what is left."""

_LEAST_CAPABILITY: Final = (8, 0)  # bfloat16 on tensor cores
_BLOCK_SIZE: Final = 16
_NUM_BLOCKS: Final = 43
_ROWS: Final = ((1, 600, tuple(range(1, 39))), (9, 0, (39,)), (5, 20, (40, 42)))
"""Tokens, where they begin, and blocks of the rows that attention is tried out on."""


class NoGpuKernels(RuntimeError):  # noqa: N818  named as what is the matter
    """The kernels cannot be had here, or compute something else than they should; the message says which."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuKernels:
    """Our own kernels for one device."""

    attention: TiledAttention
    low_rank: LowRankKernel

    def held(self, max_rank: int) -> HeldTables:
        """Where adapters lie, for steps that are captured, with room for ranks up to so many."""
        from peft_serve.kernels.triton.held import HeldEntries

        return HeldEntries(self.low_rank, max_rank=max_rank)


def speed_up(
    mode: Mode,
    base: ResidentBase,
    say: Callable[[str], None],
    *,
    load: Callable[[torch.device], GpuKernels] | None = None,
) -> GpuKernels | None:
    """Give a base on a GPU the kernels, if the mode allows them and they prove right here; what was given, or None.

    `load` makes the kernels and may raise `NoGpuKernels`. ValueError where the mode insists on kernels and there are
    none. A base on a CPU is left as it is.
    """
    if mode == "off" or (mode == "auto" and base.device.type != "cuda"):
        return None
    try:
        kernels = (load or load_kernels)(base.device)
        _try_out(kernels, base)
    except NoGpuKernels as error:
        if mode == "on":
            raise ValueError(f"--gpu-kernels on: {error}; or leave the option out") from error
        say(f"no GPU kernels of our own, so this server runs plain torch: {error}")
        return None
    base.runs.attention.whole = choose_attention(base, PlanAttention(kernels.attention), say)
    base.adapted.run_low_rank_by(kernels.low_rank)
    base.adapted.run_others_by(other_kernels(kernels.low_rank.memory))
    run_by_kernel(base, eight_bit_kernel(base.device))
    say("attention and low-rank terms run by our own GPU kernels")
    return kernels


def load_kernels(device: torch.device) -> GpuKernels:
    """The kernels for a device; nothing is compiled yet. Raises `NoGpuKernels`."""
    if device.type != "cuda":
        raise NoGpuKernels("the base is on a CPU, and they are for GPUs; give --device cuda")
    if find_spec("triton") is None:
        raise NoGpuKernels("the package triton is not installed; install the one that this version of torch names")
    capability = torch.cuda.get_device_capability(device)
    if capability < _LEAST_CAPABILITY:
        raise NoGpuKernels(f"this GPU has compute capability {capability[0]}.{capability[1]}, and they need 8.0")
    try:
        from peft_serve.kernels.triton.attention import TiledAttention
        from peft_serve.kernels.triton.low_rank import LowRankKernel
    except (ImportError, AttributeError) as error:
        raise NoGpuKernels(f"triton does not load ({type(error).__name__}: {error})") from error
    return GpuKernels(attention=TiledAttention(), low_rank=LowRankKernel(device))


@torch.inference_mode()
def _try_out(kernels: GpuKernels, base: ResidentBase) -> None:
    """A compiler's mistake, or a GPU's, is found here rather than in an answer. Raises `NoGpuKernels`."""
    if base.dtype not in _TOLERANCES:
        raise NoGpuKernels(f"they do not compute in {base.dtype}")
    others = "mixers and bottlenecks", lambda kernels, base: others_error(kernels.low_rank.memory, base)
    eight_bits = "products of 8 bits", lambda _, base: eight_bits_error(eight_bit_kernel(base.device), base)
    for name, error in (("low-rank terms", low_rank_error), ("attention", attention_error), others, eight_bits):
        try:
            found = error(kernels, base)
        except Exception as problem:  # a compiler has many ways to fail
            raise NoGpuKernels(
                f"{name} cannot be tried out ({type(problem).__name__}: {_first_line(problem)})"
            ) from problem
        if not found <= _TOLERANCES[base.dtype]:
            raise NoGpuKernels(f"{name} come out wrong on this GPU, by {found:.1e} of the largest number")


def low_rank_error(kernels: GpuKernels, base: ResidentBase) -> float:
    """The largest error of a few adapters' terms, over the largest number."""
    generator = torch.Generator().manual_seed(0)

    def small(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(base.dtype)

    layer, x_TI, y_TO = kernels.low_rank.layer(75, 70, base.dtype), small(13, 75), small(13, 70)
    exact_TO = y_TO.double()
    runs = ((1, 0, 1), (2, 1, 9), (3, 10, 13))
    for (slot, first, last), rank in zip(runs, (13, 8, 3), strict=True):
        a_RI, b_OR = small(rank, 75), small(70, rank)
        layer.put(slot, a_RI.to(base.device), b_OR.to(base.device))
        exact_TO[first:last] += x_TI[first:last].double() @ a_RI.double().t() @ b_OR.double().t()
    ours_TO = y_TO.to(base.device, copy=True)
    layer.op(Segments(runs, len(x_TI)))(ours_TO, x_TI.to(base.device))
    for slot, _, _ in runs:
        layer.drop(slot)
    return _over_largest(ours_TO, exact_TO)


def attention_error(kernels: GpuKernels, base: ResidentBase) -> float:
    """The same of attention with the base's own heads, over blocks: a row far into its context, one that begins, and
    one in between. 0 where the kernel leaves such heads to torch."""
    own = base.runs.cache if base.runs.cache.num_layers else None  # an encoder keeps nothing
    num_heads, head = base.shape.num_heads, base.shape.head_dim if own is None else own.head_dim
    kv_heads = base.shape.num_kv_heads if own is None else own.num_heads
    spans = [Span(num_tokens=n, start=start, blocks=blocks) for n, start, blocks in _ROWS]
    generator, num_tokens = torch.Generator().manual_seed(1), sum(span.num_tokens for span in spans)
    past = (_NUM_BLOCKS - 1) * _BLOCK_SIZE
    sizes = ((num_tokens, num_heads, head), *((num_tokens, kv_heads, head),) * 2, *((past, kv_heads, head),) * 2)
    drawn = [torch.randn(size, generator=generator).to(base.dtype) for size in sizes]
    terms = Terms(scaling=head**-0.5)

    def step(device: torch.device, dtype: torch.dtype) -> tuple[Plan, KVPool, Tensor, Tensor, Tensor]:
        facts = KVShape(num_layers=1, num_heads=kv_heads, head_dim=head)
        pool = KVPool(facts, num_blocks=_NUM_BLOCKS, block_size=_BLOCK_SIZE, dtype=dtype, device=device)
        plan = plan_self(spans, block_size=_BLOCK_SIZE, device=device)
        q, k, v, past_k, past_v = (each.to(device=device, dtype=dtype) for each in drawn)
        pool.write(0, torch.arange(_BLOCK_SIZE, _NUM_BLOCKS * _BLOCK_SIZE, device=device), past_k, past_v)
        assert plan.writes_T is not None, "rows of blocks write theirs"
        pool.write(0, plan.writes_T, k, v)
        return plan, pool, q, k, v

    plan, pool, q, k, v = step(torch.device("cpu"), torch.float32)
    exact = attend_reference(plan, q, k, v, pool, 0, terms)
    plan, pool, q, k, v = step(base.device, base.dtype)
    ours = PlanAttention(kernels.attention).attend(plan, pool, q, k, v, 0, terms)
    return 0.0 if ours is None else _over_largest(ours, exact)


def _over_largest(ours: Tensor, exact: Tensor) -> float:
    """The largest difference, over the largest number that should come out."""
    return float((ours.cpu().double() - exact.double()).abs().max() / exact.double().abs().max())


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:300]
