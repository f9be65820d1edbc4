"""The attention kernel against attention row by row and token by token in float32, on the CPU."""

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

from loadtest.gpu.attention_cases import CASES, CPU, LAYER, Given, Made
from loadtest.gpu.ground import Ground
from loadtest.gpu.kernels import kernels_for
from loadtest.gpu.results import Check, Found, bounded
from peft_serve.kernels.varlen import NoVarlen, Varlen, open_varlen
from peft_serve.model.attend import attend_reference
from peft_serve.model.attention import PlanKernel
from peft_serve.model.triton_attention import PlanAttention
from peft_serve.model.varlen_attention import VarlenPlans

BOUNDS: Final = {torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""Of the largest number that comes out: products and sums are float32, and shares and results rounded to the type."""

_QUICK: Final = (0,)
_DTYPES: Final = (torch.float32, torch.bfloat16, torch.float16)
_HALF: Final = 2  # cases that are tried in float16 too, which asks for nothing that bfloat16 does not
_NEEDS_S: Final = 5.0


@torch.inference_mode()
def attention(ground: Ground) -> Found:
    """Every case in every type; in float32, whether each row has the same bits by itself."""
    ours = PlanAttention(kernels_for(ground).attention)
    checks: list[Check] = []
    cases = [CASES[i] for i in _QUICK] if ground.is_quick else CASES
    for place, case in enumerate(cases):
        for dtype in _DTYPES[: 1 if ground.is_quick else 3 if place < _HALF else 2]:
            if ground.left_s < _NEEDS_S:
                left = f"{case.name} in {dtype} and those behind it: no time was left"
                return Found(checks=tuple(checks), left_out=(left,))
            made = Made(case, dtype, is_quick=ground.is_quick)
            found = _attended(ours, made.on(ground.device, dtype))
            name = f"{case.name}, {str(dtype).removeprefix('torch.')}"
            if found is None:
                checks.append(Check(name=name, passed=False, note="the kernel leaves it to torch"))
                continue
            exact = made.on(CPU, torch.float32)
            truth = attend_reference(exact.plan, exact.q, exact.k, exact.v, exact.pool, LAYER, exact.terms)
            checks.append(bounded(name, relative_error(found, truth), BOUNDS[dtype]))
            if dtype is torch.float32:
                checks.append(
                    Check(
                        name=f"{case.name}: a row by itself has the same bits", passed=_alone(ours, made, ground, found)
                    )
                )
    by_torch, left_out = over_blocks(ground)
    return Found(checks=(*checks, *by_torch), left_out=left_out)


def over_blocks(
    ground: Ground, load: Callable[[torch.device], Varlen] = open_varlen, dtype: torch.dtype = torch.bfloat16
) -> tuple[list[Check], tuple[str, ...]]:
    """torch's attention over blocks, which a server takes where it is the faster: every case that it covers; or why it
    was not looked at. `load` may raise `NoVarlen`."""
    try:
        varlen = load(ground.device)
    except NoVarlen as reason:
        return [], (f"torch's own attention over blocks: {reason}",)
    checks = []
    try:
        for case in [CASES[i] for i in _QUICK] if ground.is_quick else CASES:
            made = Made(case, dtype, is_quick=ground.is_quick)
            found = _attended(VarlenPlans(varlen.attend), made.on(ground.device, dtype))
            if found is not None:
                exact = made.on(CPU, torch.float32)
                truth = attend_reference(exact.plan, exact.q, exact.k, exact.v, exact.pool, LAYER, exact.terms)
                name = f"{case.name}, {str(dtype).removeprefix('torch.')}: by torch, over blocks"
                checks.append(bounded(name, relative_error(found, truth), BOUNDS[dtype]))
    finally:
        varlen.close()
    return checks, ()


def relative_error(found: Tensor, exact: Tensor) -> float:
    """The largest difference over the largest number."""
    ours, own = found.cpu().double(), exact.double()
    return float((ours - own).abs().max() / own.abs().max())


def _attended(ours: PlanKernel, given: Given) -> Tensor | None:
    out = ours.attend(given.plan, given.pool, given.q, given.k, given.v, LAYER, given.terms)
    ours.forget()
    return out


def _alone(ours: PlanAttention, made: Made, ground: Ground, together: Tensor) -> bool:
    parts = torch.split(together, [span.num_tokens for span in made.spans])
    same = []
    for span, part in zip(made.spans, parts, strict=True):
        own = _attended(ours, made.on(ground.device, together.dtype, [span]))
        same.append(own is not None and torch.equal(own, part))
    return all(same)
