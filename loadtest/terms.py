"""Decode steps of one kind of term: random adapters made of it, and the time of a step that runs them.

In this process and without HTTP: the resident base, a `StepRunner`, and sixteen rows of one token each. What is
measured is the executor alone.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from peft_serve.adapters.base import BaseShape, SiteKind, SiteSpec
from peft_serve.adapters.primitives import (
    Adapter,
    Affine,
    BlockDiagonal,
    Dense,
    Edit,
    GatedPrompt,
    Kronecker,
    LowRank,
    Paired,
    Replace,
    Rescaled,
    Rows,
    Sparse,
    tensors_of,
)
from peft_serve.core import BASE_SLOT, AdapterId, Draw, Install, RequestId, Row, SamplingParams, Step
from peft_serve.model.base import ResidentBase
from peft_serve.model.packing import can_pack
from peft_serve.model.runner import StepRunner

NUM_ROWS = 16
CONTEXT = 32  # tokens before the one of the step
_BLOCK_SIZE = 16


class Dice:
    """Random tensors, small enough that sixteen layers of them stay finite."""

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._dtype = dtype

    def small(self, *shape: int) -> Tensor:
        return (0.02 * torch.randn(shape, generator=self._generator)).to(self._dtype)

    def gain(self, *shape: int) -> Tensor:
        return (1 + 0.1 * torch.randn(shape, generator=self._generator)).to(self._dtype)

    def places(self, bound: int, count: int) -> Tensor:
        return torch.randint(0, bound, (count,), generator=self._generator)

    def some(self, bound: int, count: int) -> Tensor:
        return torch.randperm(bound, generator=self._generator)[:count]


EditOf = Callable[[SiteSpec, BaseShape, Dice], Edit | None]
"""The term at this site, or None where it has no business."""


def on_linear(make: Callable[[int, int, Dice], Affine]) -> EditOf:
    """A term of every linear layer but the head, from its out and in features."""

    def edit(spec: SiteSpec, shape: BaseShape, dice: Dice) -> Edit | None:
        is_ours = spec.kind is SiteKind.LINEAR and spec.out_features != shape.vocab_size
        return make(spec.out_features, spec.in_features, dice) if is_ours else None

    return edit


def _blocks(size: int, dice: Dice) -> BlockDiagonal:
    return BlockDiagonal(torch.eye(32, dtype=dice.small(1).dtype) + dice.small(size // 32, 32, 32))


def _rescaled(num_out: int, num_in: int, dice: Dice) -> Affine:
    shared = Dice(0, dice.small(1).dtype)  # one pair of factors for every adapter of a size
    factors = shared.small(64, num_in), shared.small(num_out, 64)
    return Affine(maps=(Rescaled(f"{num_out} by {num_in}", *factors, dice.gain(64), dice.gain(num_out)),))


def _sparse(num_out: int, num_in: int, dice: Dice) -> Affine:
    count = num_out * num_in // 100
    return Affine(maps=(Sparse(dice.places(num_out, count), dice.places(num_in, count), dice.small(count)),))


def _norms(spec: SiteSpec, _: BaseShape, dice: Dice) -> Edit | None:
    return Replace({"weight": dice.gain(spec.out_features)}) if spec.kind is SiteKind.NORM else None


def _rows(spec: SiteSpec, shape: BaseShape, dice: Dice) -> Edit | None:
    if shape.vocab_size not in (spec.in_features, spec.out_features):
        return None
    return Affine(rows=Rows(dice.some(shape.vocab_size, 64), dice.small(64, shape.hidden_size)))


def _gated_prompt(spec: SiteSpec, shape: BaseShape, dice: Dice) -> Edit | None:
    if spec.kind is not SiteKind.ATTENTION:
        return None
    keys, values = (dice.small(shape.num_kv_heads, 10, shape.head_dim) for _ in range(2))
    return GatedPrompt(keys, values, dice.gain(1), is_projected=True)


TERMS: dict[str, EditOf] = {
    "low rank 8": on_linear(lambda o, i, d: Affine(delta=LowRank(d.small(8, i), d.small(o, 8)))),
    "input scale": on_linear(lambda _, i, d: Affine(in_scale=d.gain(i))),
    "output scale and shift": on_linear(lambda o, _, d: Affine(out_scale=d.gain(o), shift=d.small(o))),
    "input blocks of 32": on_linear(lambda _, i, d: Affine(in_mix=_blocks(i, d))),
    "output blocks of 32": on_linear(lambda o, _, d: Affine(out_mix=_blocks(o, d))),
    "pairs": on_linear(lambda o, _, d: Affine(out_mix=Paired(d.gain(o), d.small(o), 64))),
    "rescaled, rank 64": on_linear(_rescaled),
    "Kronecker, 8 by 8": on_linear(lambda o, i, d: Affine(maps=(Kronecker(d.small(8, 8), d.small(o // 8, i // 8)),))),
    "sparse, 1 %": on_linear(_sparse),
    "dense": on_linear(lambda o, i, d: Affine(maps=(Dense(d.small(o, i)),))),
    "64 rows of the vocabulary": _rows,
    "own norms": _norms,
    "gated prompt of 10": _gated_prompt,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Timed:
    """One point: a term, so many distinct adapters of it, and the step that runs them."""

    term: str
    num_adapters: int
    step_s: float
    base_s: float  # the same rows without adapters, in turns with it
    num_bytes: int  # of the adapters' terms, shared ones counted once


class StepBench:
    """A base with sixteen rows in the middle of their answers."""

    def __init__(self, base: ResidentBase) -> None:
        num_blocks = -(-(CONTEXT + 1) // _BLOCK_SIZE)
        self._adapters: dict[AdapterId, Adapter] = {}
        self._base = base
        self._runner = StepRunner(
            base,
            num_blocks=NUM_ROWS * num_blocks + 1,
            num_cross_blocks=0,
            block_size=_BLOCK_SIZE,
            adapters=self._adapters.__getitem__,
        )
        self._tables = [tuple(range(1 + r * num_blocks, 1 + (r + 1) * num_blocks)) for r in range(NUM_ROWS)]
        self._runner.run(Step(id=0, rows=tuple(self._row(r, BASE_SLOT, 0, CONTEXT) for r in range(NUM_ROWS))))

    @property
    def num_bytes(self) -> int:
        """What a step reads of the base: its linear layers, the head among them."""
        sites = self._base.sites.values()
        num_weights = sum(s.out_features * s.in_features for s in sites if s.kind is SiteKind.LINEAR)
        return num_weights * self._base.dtype.itemsize

    def adapter(self, make: EditOf, seed: int) -> Adapter:
        """A random adapter of one term, at every site that takes it."""
        dice = Dice(seed, self._base.dtype)
        edits = ((path, make(spec, self._base.shape, dice)) for path, spec in self._base.sites.items())
        sites = {path: edit for path, edit in edits if edit is not None}
        return Adapter(id=AdapterId(f"sha256:{seed}"), method="TEST", sites=sites)

    @contextmanager
    def holding(self, adapters: Mapping[int, Adapter]) -> Iterator[None]:
        """Adapters by slot, installed inside the block."""
        self._adapters.update({adapter.id: adapter for adapter in adapters.values()})
        installs = tuple(Install(slot=slot, adapter=adapter.id) for slot, adapter in adapters.items())
        done = self._runner.run(Step(id=1, rows=(), installs=installs))
        if done.failed_installs:
            raise RuntimeError(f"an adapter could not be installed: {done.failed_installs[0][1]}")
        try:
            yield
        finally:
            self._runner.run(Step(id=2, rows=(), removes=tuple(adapters)))
            self._adapters.clear()

    def beside_base_s(self, slots: list[int], *, repeats: int) -> tuple[float, float]:
        """Seconds of a decode step whose rows use these slots, and of one without adapters: medians of so many,
        taken in turns, so that a machine that slows down slows both."""
        own, base = (self._rows(each) for each in (sorted(slots), [BASE_SLOT] * NUM_ROWS))
        times = [(self._step_s(own), self._step_s(base)) for _ in range(repeats + 2)]
        kept = times[2:]  # the first two gather ops and fill caches
        return median(pair[0] for pair in kept), median(pair[1] for pair in kept)

    def _step_s(self, rows: tuple[Row, ...]) -> float:
        began_s = time.perf_counter()
        self._runner.run(Step(id=3, rows=rows))  # what is drawn is read back: the device is done
        return time.perf_counter() - began_s

    def _rows(self, slots: list[int]) -> tuple[Row, ...]:
        return tuple(self._row(number, slot, CONTEXT, 1) for number, slot in enumerate(slots))

    def _row(self, number: int, slot: int, start: int, num_tokens: int) -> Row:
        tokens = tuple(5 + (7 * number + place) % 50 for place in range(start, start + num_tokens))
        return Row(
            request=RequestId(str(number)),
            slot=slot,
            tokens=tokens,
            start=start,
            blocks=self._tables[number],
            draw=Draw(params=SamplingParams(), seed=0, index=0),
        )


def load_bench(folder: Path, *, dtype: torch.dtype, device: str, num_threads: int) -> StepBench:
    """The base of a folder, packed as the server would have it."""
    torch.set_num_threads(num_threads)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device)
    base = ResidentBase(model, name=folder.name)
    if can_pack(base.device, base.dtype):
        base.adapted.pack()
    return StepBench(base)


def time_term(bench: StepBench, term: str, counts: tuple[int, ...], *, repeats: int, max_bytes: int) -> Iterator[Timed]:
    """One point for each number of distinct adapters; those whose terms take more than `max_bytes` are left out."""
    for count in counts:
        adapters = {}
        for slot in range(1, count + 1):
            adapters[slot] = bench.adapter(TERMS[term], slot)
            if bytes_of(adapters) > max_bytes:
                return
        with bench.holding(adapters):
            step_s, base_s = bench.beside_base_s([1 + r % count for r in range(NUM_ROWS)], repeats=repeats)
        yield Timed(
            term=term,
            num_adapters=count,
            step_s=step_s,
            base_s=base_s,
            num_bytes=bytes_of(adapters),
        )


def bytes_of(adapters: Mapping[int, Adapter]) -> int:
    """What adapters take; factors of one key once."""
    by_place: dict[object, int] = {}
    for adapter in adapters.values():
        for edit in adapter.sites.values():
            maps = edit.maps if isinstance(edit, Affine) else ()
            shared = {id(t): one.key for one in maps if isinstance(one, Rescaled) for t in (one.a_RI, one.b_OR)}
            for tensor in tensors_of(edit):
                place = (shared[id(tensor)], tensor.shape) if id(tensor) in shared else id(tensor)
                by_place[place] = tensor.numel() * tensor.element_size()
    return sum(by_place.values())
