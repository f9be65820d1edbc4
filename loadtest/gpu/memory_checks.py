"""Memory that runs out, in a load and in a step: who asked for too much fails, and everybody else gets what they would.

The process is given a share of the device's memory just above what it holds, which is how it runs out without filling
the device.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Final

import torch

from loadtest.gpu.ground import Ground
from loadtest.gpu.random_adapters import lora, on_host
from loadtest.gpu.results import Check, Found
from loadtest.gpu.rows import BLOCK_SIZE, Steps
from loadtest.gpu.shapes import Shape, decoder, make
from loadtest.work import Load
from peft_serve.adapters.primitives import Adapter
from peft_serve.core import AdapterId, Install, Row, Step, StepResult
from peft_serve.engine.gpu_kernels import speed_up
from peft_serve.model.base import ResidentBase
from peft_serve.model.runner import StepRunner

_SPARE: Final = 48 << 20
_RANK: Final = 512
_LONG: Final = 4096  # tokens, each of which wants its log-probability: their logits are what does not fit
_LOAD: Final = Load(num_rows=4, context=32)


def memory(ground: Ground) -> Found:
    """On a small base of its own."""
    base = ResidentBase(make(_small(), ground.device), name="small")
    speed_up("auto", base, lambda _: None)
    adapters: dict[AdapterId, Adapter] = {}
    runner = StepRunner(
        base,
        num_blocks=2 + _LONG // BLOCK_SIZE + 64,
        num_cross_blocks=0,
        block_size=BLOCK_SIZE,
        adapters=adapters.__getitem__,
    )
    rows = Steps(base, [_LOAD]).decoding(_LOAD)
    before = _tokens(runner.run(Step(id=1, rows=rows)))
    good = lora(base, "good", 8, seed=1)
    adapters[good.id] = good
    runner.run(Step(id=2, rows=(), installs=(Install(slot=1, adapter=good.id),)))
    with_good = tuple(replace(row, slot=1) for row in rows)
    adapted = _tokens(runner.run(Step(id=3, rows=with_good)))
    checks = [
        *_load(ground, base, runner, adapters, rows, before),
        *_step(ground, runner, rows, before),
    ]
    same = _tokens(runner.run(Step(id=9, rows=with_good))) == adapted
    checks.append(Check(name="an adapter that was there all the while gives the same tokens behind it", passed=same))
    return Found(checks=tuple(checks))


def _small() -> Shape:
    """The 8 B shape's layers, four of them, of a fourth of the width: large enough to run out, small enough to make."""
    whole = decoder(is_quick=False)

    def config() -> object:
        made = whole.config()
        made.hidden_size, made.intermediate_size, made.num_hidden_layers = 1024, 3584, 4
        made.num_attention_heads, made.num_key_value_heads, made.head_dim = 8, 2, 128
        made.vocab_size = 32000
        return made

    return Shape("small", whole.kind, config, whole.dtype)


def _load(
    ground: Ground,
    base: ResidentBase,
    runner: StepRunner,
    adapters: dict[AdapterId, Adapter],
    rows: tuple[Row, ...],
    before: list[int | None],
) -> list[Check]:
    """An adapter that does not fit is refused; the step it came with runs, and later it fits."""
    large = on_host(lora(base, "large", _RANK, seed=2))
    adapters[large.id] = large
    with little_memory(ground, 8 << 20):
        done = runner.run(Step(id=4, rows=rows, installs=(Install(slot=2, adapter=large.id),)))
    reasons = [reason for _, reason in done.failed_installs]
    after = runner.run(Step(id=5, rows=rows, installs=(Install(slot=2, adapter=large.id),)))
    return [
        Check(name="a load without memory is refused", passed="memory" in " ".join(reasons), note="; ".join(reasons)),
        Check(name="the rows beside it get their tokens", passed=_tokens(done) == before),
        Check(name="with memory it is loaded", passed=not after.failed_installs and _tokens(after) == before),
    ]


def _step(ground: Ground, runner: StepRunner, rows: tuple[Row, ...], before: list[int | None]) -> list[Check]:
    """A row that asks for more than there is fails alone."""
    first = 1 + max(block for row in rows for block in row.blocks)
    blocks = tuple(range(first, first + _LONG // BLOCK_SIZE))
    greedy = replace(
        rows[0],
        request=type(rows[0].request)("greedy"),
        tokens=tuple(5 + i % 50 for i in range(_LONG)),
        start=0,
        blocks=blocks,
        draw=None,
        wanted=((5,),) * _LONG,
    )
    with little_memory(ground, _SPARE):
        done = runner.run(Step(id=6, rows=(*rows, greedy)))
    failed = [str(one.request) for one in done.rows if one.failure is not None]
    after = runner.run(Step(id=7, rows=rows))
    return [
        Check(name="a step without memory fails for the row that asked", passed=failed == ["greedy"], note=str(failed)),
        Check(name="the other rows get their tokens", passed=_tokens(done)[: len(rows)] == before),
        Check(name="it is said that memory was short", passed=done.was_short_of_memory),
        Check(name="the next step is as before", passed=_tokens(after) == before),
    ]


@contextmanager
def little_memory(ground: Ground, spare: int) -> Iterator[None]:
    """So many bytes above what is held now are all that can be had inside the block."""
    gc.collect()
    torch.cuda.empty_cache()
    _, total = torch.cuda.mem_get_info(ground.device)
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved(ground.device) + spare) / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def _tokens(done: StepResult) -> list[int | None]:
    return [one.token for one in done.rows]
