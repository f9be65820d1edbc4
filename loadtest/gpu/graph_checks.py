"""Kernels captured in a CUDA graph, replayed for other rows and other adapters than they were captured for.

A decode step that is replayed launches the same programs over the same memory; what it serves is in tables that are
written before. Here each kernel is captured once and replayed for a step that it has not seen.
"""

from dataclasses import replace
from math import pow
from typing import Final

import torch
from torch import Tensor

from loadtest.gpu.attention_cases import CPU, LAYER, Case, Made
from loadtest.gpu.attention_checks import BOUNDS, relative_error
from loadtest.gpu.ground import Ground
from loadtest.gpu.kernels import kernels_for
from loadtest.gpu.low_rank_checks import BOUNDS as LOW_RANK_BOUNDS
from loadtest.gpu.results import Check, Found, bounded
from peft_serve.kernels.low_rank import Segments
from peft_serve.kernels.triton.attention_terms import Memory, Scores
from peft_serve.kernels.triton.attention_tiles import Reader, Tables, lay_out
from peft_serve.model.attend import attend_reference

_DTYPE: Final = torch.bfloat16
_DECODE: Final = Case(name="decode", rows="decode", heads=32, kv_heads=8, head=128)
_SIZE: Final = 1024
_RANKS: Final = {1: 8, 2: 64, 3: 16, 4: 1}
_STEPS: Final = (((1, 0, 1), (2, 1, 2), (3, 2, 4)), ((4, 0, 2), (1, 3, 4)), ())


@torch.inference_mode()
def graphs(ground: Ground) -> Found:
    """Each kernel, replayed."""
    return Found(checks=(*_low_rank(ground), *_attention(ground)))


def _captured(act: object) -> torch.cuda.CUDAGraph:
    """The launches of a call, after one that compiled what it needs."""
    assert callable(act)
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        act()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        act()
    return graph


def _low_rank(ground: Ground) -> list[Check]:
    kernel, device = kernels_for(ground).low_rank, ground.device
    generator = torch.Generator().manual_seed(0)

    def small(*size: int) -> Tensor:
        return (torch.randn(size, generator=generator) * pow(size[-1], -0.25)).to(_DTYPE)

    layer, num_tokens = kernel.layer(_SIZE, _SIZE, _DTYPE), 4
    factors = {slot: (small(rank, _SIZE), small(_SIZE, rank)) for slot, rank in _RANKS.items()}
    for slot, (a_RI, b_OR) in factors.items():
        layer.put(slot, a_RI.to(device), b_OR.to(device))
    x_TI, y_TO = small(num_tokens, _SIZE), small(num_tokens, _SIZE)
    x, out = x_TI.to(device), y_TO.to(device, copy=True)
    bucket = kernel.bucket(num_tokens, max_rank=max(_RANKS.values()))
    kernel.fill(bucket, Segments(((2, 0, 4),), num_tokens))
    op = layer.op(bucket)
    graph = _captured(lambda: op(out, x))
    checks = []
    for runs in _STEPS:
        kernel.fill(bucket, Segments(runs, num_tokens))
        out.copy_(y_TO)
        graph.replay()
        exact = y_TO.double()
        for slot, first, last in runs:
            a, b = (each.double() for each in factors[slot])
            exact[first:last] += (x_TI[first:last].double() @ a.t()).to(_DTYPE).double() @ b.t()
        slots = ", ".join(str(slot) for slot, _, _ in runs) or "none"
        checks.append(
            bounded(f"low-rank terms, replayed for slots {slots}", relative_error(out, exact), LOW_RANK_BOUNDS[_DTYPE])
        )
    return checks


def _attention(ground: Ground) -> list[Check]:
    kernel = kernels_for(ground).attention
    first = Made(_DECODE, _DTYPE, seed=1)
    given, exact = first.on(ground.device, _DTYPE), first.on(CPU, torch.float32)
    assert given.pool is not None
    assert exact.pool is not None
    keys, values = given.pool.layer(LAYER)
    memory = Memory(keys_PKD=keys, values_PKD=values, block_size=given.pool.block_size)
    scores, group = Scores(scaling=given.terms.scaling), _DECODE.heads // _DECODE.kv_heads

    def readers(turned: bool) -> list[Reader]:
        """The rows of the step; turned, each token reads what another one reads."""
        spans = list(given.plan.spans)
        contexts = [*spans[1:], spans[0]] if turned else spans
        return [
            Reader(token=at, num_tokens=1, place=span.start, stop=span.stop, blocks=span.blocks)
            for at, span in enumerate(contexts)
        ]

    tables = Tables(lay_out(readers(False), group=group, sizes=kernel.sizes), ground.device)
    held: list[Tensor] = []
    graph = _captured(lambda: held.append(kernel.attend(tables, scores, given.q, memory)))
    checks = []
    for turned in (False, True):
        tables.refill(lay_out(readers(turned), group=group, sizes=kernel.sizes))
        graph.replay()
        spans = list(exact.plan.spans)
        contexts = tuple([*spans[1:], spans[0]] if turned else spans)
        plan = replace(exact.plan, spans=contexts)
        truth = attend_reference(plan, exact.q, exact.k, exact.v, exact.pool, LAYER, exact.terms)
        which = "other contexts" if turned else "the same contexts"
        error = relative_error(held[-1], truth)
        checks.append(bounded(f"attention, replayed for {which}", error, BOUNDS[_DTYPE]))
    return checks
