"""The first steps of a base on a GPU, run at start: a kernel is compiled when it is first used, which takes seconds,
and nobody's request shall wait for that.

Kernels are compiled anew for the sizes of layers and heads and for what is fused into them, so nothing less than steps
of this very base will do: prompts and decode steps, of the base alone, with low-rank terms, and with scales and shifts
beside them. What further kinds of terms compile, they compile at their first use. Knows no request and no scheduler.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

import torch

from peft_serve.adapters.base import SiteKind
from peft_serve.adapters.primitives import Adapter, Affine, LowRank
from peft_serve.core import BASE_SLOT, AdapterId, Draw, Install, Reading, RequestId, Row, SamplingParams, Step
from peft_serve.model.base import ResidentBase
from peft_serve.model.runner import StepRunner

_RANK: Final = 16
_MOST_CONTEXT: Final = 2048  # of one row: long enough to be read in parts
_MOST_PROMPT: Final = 512  # tokens: any prompt of more than a tile's compiles the same
_SOURCE: Final = 32  # tokens that an encoder reads
_GREEDY: Final = Draw(params=SamplingParams(), seed=0, index=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSizes:
    """What steps may come to: rows, tokens of one row, and positions of a context."""

    max_rows: int
    max_step_tokens: int
    max_context: int
    block_size: int

    @property
    def prompt(self) -> int:
        return max(1, min(_MOST_PROMPT, self.max_step_tokens, self.max_context - 1))

    @property
    def context(self) -> int:
        return max(0, min(_MOST_CONTEXT, self.max_context) - 1)

    def blocks(self, num_positions: int) -> int:
        """KV blocks for so many positions."""
        return -(-num_positions // self.block_size)


def warm_up(base: ResidentBase, sizes: StepSizes, say: Callable[[str], None], *, clock: Callable[[], float]) -> None:
    """Run steps of every kind once; nothing of them stays. Where one fails, the server says so and goes on: what the
    steps prove, others have proved before."""
    began_s, adapters = clock(), dict(enumerate(_adapters(base), start=1))
    by_id = {adapter.id: adapter for adapter in adapters.values()}
    try:
        runner = StepRunner(
            base,
            num_blocks=1 + sizes.max_rows + sizes.blocks(sizes.context + 1) + sizes.blocks(sizes.prompt),
            num_cross_blocks=1 + sizes.blocks(_SOURCE) if base.shape.is_encoder_decoder else 0,
            block_size=sizes.block_size,
            adapters=by_id.__getitem__,
        )
        try:
            _run_all(base, sizes, runner, adapters)
        finally:
            runner.run(Step(id=0, rows=(), removes=tuple(adapters)))
    except RuntimeError as error:
        say(f"kernels are compiled when they are first used, since a step to warm up failed: {error}")
        return
    say(f"kernels compiled for this base in {clock() - began_s:.1f} s")


def _run_all(base: ResidentBase, sizes: StepSizes, runner: StepRunner, adapters: dict[int, Adapter]) -> None:
    installs = tuple(Install(slot=slot, adapter=adapter.id) for slot, adapter in adapters.items())
    steps = [Step(id=0, rows=(), installs=installs)]
    steps += [Step(id=0, rows=rows) for slot in (BASE_SLOT, *adapters) for rows in _kinds(base, sizes, slot)]
    for step in steps:
        done = runner.run(step)
        reasons = [reason for _, reason in done.failed_installs]
        reasons += [str(row.failure) for row in done.rows if row.failure is not None]
        if reasons:
            raise RuntimeError(reasons[0])


def _adapters(base: ResidentBase) -> Iterator[Adapter]:
    """Two that change nothing, at every linear layer of the body."""
    specs = [spec for spec in base.sites.values() if spec.kind is SiteKind.LINEAR and spec.path not in base.beside_body]

    def made(name: str, *, has_vectors: bool) -> Adapter:
        like = torch.empty(0, dtype=base.dtype, device=base.device)
        sites = {
            spec.path: Affine(
                delta=LowRank(like.new_zeros(_RANK, spec.in_features), like.new_zeros(spec.out_features, _RANK)),
                out_scale=like.new_ones(spec.out_features) if has_vectors else None,
                shift=like.new_zeros(spec.out_features) if has_vectors else None,
            )
            for spec in specs
        }
        return Adapter(id=AdapterId(f"sha256:{name}"), method="LORA", sites=sites)

    yield made("warm-up", has_vectors=False)
    yield made("warm-up with vectors", has_vectors=True)


def _kinds(base: ResidentBase, sizes: StepSizes, slot: int) -> Iterator[tuple[Row, ...]]:
    """The rows of steps that a server runs: prompts, and decode steps of one row and of many."""
    if base.shape.is_encoder:
        yield (_read(slot, 0, sizes.prompt),)
        yield tuple(_read(slot, number, 1) for number in range(sizes.max_rows))
        return
    if base.shape.is_encoder_decoder:
        yield (_row(base, sizes, slot, 0, source=tuple(range(1, 1 + _SOURCE))),)
    else:
        yield (_row(base, sizes, slot, 0, num_tokens=sizes.prompt),)
    yield (_row(base, sizes, slot, 0),)
    yield (
        *(_row(base, sizes, slot, number) for number in range(sizes.max_rows - 1)),
        _row(base, sizes, slot, sizes.max_rows - 1, start=sizes.context),
    )


def _row(
    base: ResidentBase,
    sizes: StepSizes,
    slot: int,
    number: int,
    *,
    num_tokens: int = 1,
    start: int = 0,
    source: tuple[int, ...] = (),
) -> Row:
    """A row that decodes, or computes a prompt; on an encoder-decoder, all rows share what the first one read."""
    num_blocks = sizes.blocks(start + num_tokens)
    is_crossed = base.shape.is_encoder_decoder
    return Row(
        request=RequestId(f"warm-up-{number}"),
        slot=slot,
        tokens=(1,) * num_tokens,
        start=start,
        blocks=tuple(range(1 + number, 1 + number + num_blocks)),
        draw=_GREEDY if base.shape.generates else None,
        source=source,
        cross_blocks=tuple(range(1, 1 + sizes.blocks(_SOURCE))) if is_crossed else (),
        num_source=_SOURCE if is_crossed else 0,
    )


def _read(slot: int, number: int, num_tokens: int) -> Row:
    """A row of an encoder."""
    return Row(
        request=RequestId(f"warm-up-{number}"),
        slot=slot,
        tokens=(),
        start=0,
        blocks=(),
        source=(1,) * num_tokens,
        num_source=num_tokens,
        reading=Reading.MEAN,
    )
