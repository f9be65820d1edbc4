"""The other kernels of ours against their bytes: mixers, bottlenecks, and products with weights of 8 bits.

The latter stand beside torch's product in full, its product with the decoded matrix, and its own with whole numbers.
Layers take turns, so that what they read does not stay in a cache until it is asked again.
"""

from collections.abc import Callable
from itertools import cycle
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn.functional import linear

from loadtest.gpu.facts import ceilings
from loadtest.gpu.ground import Ground
from loadtest.gpu.kernels import kernels_for
from loadtest.gpu.results import Figures, Found, Value
from loadtest.gpu.timing import Act, kernels_in_turns
from peft_serve.engine.gpu_eight_bits import eight_bit_kernel
from peft_serve.engine.gpu_terms import other_kernels
from peft_serve.kernels.bottleneck import Squeeze
from peft_serve.kernels.eight_bits import Code, Coded, coded, multiplied
from peft_serve.kernels.low_rank import Segments

_SIZE: Final = 4096
_WIDE: Final = 14336  # outputs of the widest layer of the 8 B shape
_BLOCK: Final = 32  # side of a mixer's blocks (OFT), as peft makes them
_SQUEEZED: Final = 64  # features of a bottleneck
_LAYERS: Final = 8
_STEPS: Final = ((32, 1), (4, 128))  # rows, each of another adapter, and their tokens
_TOKENS: Final = (1, 32, 64, 512)
_MOST_S: Final = 1.0
_NEEDS_S: Final = 1.0


@torch.inference_mode()
def others(ground: Ground) -> Found:
    """Two tables."""
    terms = tuple(
        _terms(ground, name, num_rows, num_tokens)
        for name in ("mixers", "bottlenecks")
        for num_rows, num_tokens in (((2, 1),) if ground.is_quick else _STEPS)
    )
    columns = ("what", "step", "kernel us", "spread", "launch us", "bytes us", "kernel over bytes")
    size = _size(ground)
    title = f"Mixers of blocks of {_BLOCK} and bottlenecks of {_SQUEEZED}, one layer of {size}"
    figures = [Figures(title=title, columns=columns, rows=terms)]
    rows: list[tuple[Value, ...]] = []
    left_out: tuple[str, ...] = ()
    for num_out in (_size(ground),) if ground.is_quick else (_SIZE, _WIDE):
        for num_tokens in (2,) if ground.is_quick else _TOKENS:
            for code in Code:
                if rows and ground.left_s < _NEEDS_S:
                    left_out = (f"{code}, {num_tokens} tokens, and what is behind it: no time was left",)
                    break
                rows.append(_product(ground, code, num_out, num_tokens))
    columns = (
        *("weights", "outputs", "tokens", "kernel us", "spread", "bytes us", "kernel over bytes"),
        *("in full us", "decoded us", "torch int8 us", "full over kernel"),
    )
    figures.append(Figures(title=f"Products with weights of 8 bits, {size} inputs", columns=columns, rows=tuple(rows)))
    return Found(figures=tuple(figures), left_out=left_out)


def _terms(ground: Ground, name: str, num_rows: int, num_tokens: int) -> tuple[Value, ...]:
    size, dtype = _size(ground), _dtype(ground)
    small = _drawing(ground)
    runs = tuple((1 + row, row * num_tokens, (row + 1) * num_tokens) for row in range(num_rows))
    segments = Segments(runs, num_rows * num_tokens)
    x, y = small(num_rows * num_tokens, size), small(num_rows * num_tokens, size)
    kernels, ops = other_kernels(kernels_for(ground).low_rank.memory), list[Act]()
    block, squeezed = (8, 8) if ground.is_quick else (_BLOCK, _SQUEEZED)
    for _ in range(2 if ground.is_quick else _LAYERS):
        if name == "mixers":
            mixing = kernels.mixing.layer(size, dtype)
            for slot, _, _ in runs:
                mixing.put(slot, small(size // block, block, block))
            ops.append(_called(mixing.op(segments), y, x))
        else:
            squeezing = kernels.bottlenecks.layer(size, dtype)
            for slot, _, _ in runs:
                squeezing.put(slot, _squeeze(small, size, squeezed))
            ops.append(_called(squeezing.op(segments, "relu"), x))
    each = cycle(ops)
    took = kernels_in_turns(ground, {"": lambda: next(each)()}, most_s=min(_MOST_S, max(0.0, ground.left_s)))[""]
    own = size * block if name == "mixers" else 2 * size * squeezed
    bound_s = dtype.itemsize * (num_rows * own + 2 * x.numel()) / ceilings(ground).bytes_per_s
    return (
        *(name, f"{num_rows} rows of {num_tokens}", 1e6 * took.device.median_s, took.device.words),
        *(1e6 * took.host.median_s, 1e6 * bound_s, took.device.median_s / bound_s),
    )


def _called(op: Callable[..., object], *given: Tensor) -> Act:
    return lambda: op(*given)


def _squeeze(small: Callable[..., Tensor], size: int, squeezed: int) -> Squeeze:
    return Squeeze(
        down_BD=small(squeezed, size),
        down_bias_B=small(squeezed),
        up_DB=small(size, squeezed),
        up_bias_D=small(size),
        scale_D=small(size),
    )


def _product(ground: Ground, code: Code, num_out: int, num_tokens: int) -> tuple[Value, ...]:
    num_in, small = _size(ground), _drawing(ground)
    x = small(num_tokens, num_in)
    full = [small(num_out, num_in) for _ in range(2 if ground.is_quick else _LAYERS)]
    stored = [coded(weight, code) for weight in full]
    kernel = eight_bit_kernel(ground.device)
    plain, first, second, third = cycle(full), cycle(stored), cycle(stored), cycle(stored)
    acts: dict[str, Act] = {
        "kernel": lambda: kernel.multiply(x, next(first), None),
        "in full": lambda: linear(x, next(plain)),
        "decoded": lambda: multiplied(x, next(second), None),
    }
    if code is Code.INT8 and _has_own(x, stored[0]):
        steps = {id(one): one.steps_O.to(x.dtype) for one in stored}
        acts["torch int8"] = lambda: _own(x, one := next(third), steps[id(one)])
    took = kernels_in_turns(ground, acts, most_s=min(_MOST_S, max(0.0, ground.left_s)))
    bound_s = (num_out * num_in + x.element_size() * num_tokens * (num_in + num_out)) / ceilings(ground).bytes_per_s
    ours = took["kernel"].device
    beside = [
        1e6 * took[name].device.median_s if name in took else None for name in ("in full", "decoded", "torch int8")
    ]
    return (
        *(str(code), num_out, num_tokens, 1e6 * ours.median_s, ours.words, 1e6 * bound_s, ours.median_s / bound_s),
        *(*beside, took["in full"].device.median_s / ours.median_s),
    )


def _own(x: Tensor, weight: Coded, steps_O: Tensor) -> Any:
    return torch._weight_int8pack_mm(x, weight.values_OI, steps_O)


def _has_own(x: Tensor, weight: Coded) -> bool:
    """Whether torch multiplies by whole numbers on this device."""
    try:
        _own(x, weight, weight.steps_O.to(x.dtype))
    except (RuntimeError, NotImplementedError):
        return False
    return True


def _drawing(ground: Ground) -> Callable[..., Tensor]:
    generator, dtype = torch.Generator(ground.device).manual_seed(0), _dtype(ground)
    return lambda *size: (0.02 * torch.randn(size, generator=generator, device=ground.device)).to(dtype)


def _dtype(ground: Ground) -> torch.dtype:
    return torch.bfloat16 if ground.is_gpu else torch.float32


def _size(ground: Ground) -> int:
    return 32 if ground.is_quick else _SIZE
