"""The low-rank kernels against the formula, adapter by adapter in float64 on the CPU."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import pow
from typing import Any, Final

import torch
from torch import Tensor

from loadtest.gpu.attention_checks import relative_error
from loadtest.gpu.ground import Ground
from loadtest.gpu.kernels import grouped_for, kernels_for
from loadtest.gpu.results import Check, Found, bounded
from peft_serve.kernels.low_rank import Segments

BOUNDS: Final = {torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
_NEEDS_S: Final = 3.0

Runs = tuple[tuple[int, int, int], ...]
"""(slot, first token, last + 1)"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A layer, its adapters' ranks by slot, and whose the tokens are; those of no run are the base's."""

    name: str
    num_in: int
    num_out: int
    ranks: Mapping[int, int]
    runs: Runs
    num_tokens: int
    is_long: bool = False  # some run is long enough for grouped products


def _decode(num_rows: int) -> Runs:
    return tuple((1 + row, row, row + 1) for row in range(num_rows))


CASES: Final = (
    Case(
        name="a few rows, odd sizes",
        num_in=75,
        num_out=70,
        ranks={1: 13, 2: 8, 3: 3},
        runs=((1, 0, 1), (2, 2, 9), (3, 10, 12)),
        num_tokens=13,
    ),
    Case(
        name="decode, 32 adapters of mixed ranks",
        num_in=4096,
        num_out=1024,
        ranks={slot: (8, 16, 64, 1)[slot % 4] for slot in range(1, 33)},
        runs=_decode(32),
        num_tokens=32,
    ),
    Case(
        name="prompts beside decode",
        num_in=1024,
        num_out=3584,
        ranks={1: 16, 2: 64, 3: 5, 4: 256},
        runs=((1, 0, 200), (2, 200, 201), (3, 210, 290), (4, 290, 293), (1, 300, 420)),
        num_tokens=450,
        is_long=True,
    ),
)


@torch.inference_mode()
def low_rank(ground: Ground) -> Found:
    """Every case in every type, with and without scales and shifts, alone, and after adapters came and went."""
    kernel = kernels_for(ground).low_rank
    checks: list[Check] = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16)[: 1 if ground.is_quick else None]:
        for case in CASES[: 1 if ground.is_quick else None]:
            if ground.left_s < _NEEDS_S:
                left = f"{case.name} in {dtype} and those behind it: no time was left"
                return Found(checks=tuple(checks), left_out=(left,))
            checks += _Trial(case, dtype, kernel, ground).checks()
    if not ground.is_quick:
        (case,) = (one for one in CASES if one.is_long)
        error = _Trial(case, torch.bfloat16, grouped_for(ground), ground).error()
        checks.append(bounded(f"{case.name}, bfloat16: by torch's grouped products", error, BOUNDS[torch.bfloat16]))
    return Found(checks=tuple(checks))


class _Trial:
    """One case in one type."""

    def __init__(self, case: Case, dtype: torch.dtype, kernel: Any, ground: Ground) -> None:
        self._case, self._dtype, self._ground = case, dtype, ground
        self._generator = torch.Generator().manual_seed(0)
        self._layer = kernel.layer(case.num_in, case.num_out, dtype)
        self._factors = {slot: self._drawn(rank) for slot, rank in case.ranks.items()}
        self._x = self._small(case.num_tokens, case.num_in)
        self._y = self._small(case.num_tokens, case.num_out)

    def error(self) -> float:
        """The largest error over the largest number, of the terms alone."""
        for slot, factors in self._factors.items():
            self._put(slot, factors)
        return relative_error(self._run(self._case.runs, self._x, self._y), self._exact())

    def checks(self) -> list[Check]:
        """What holds of the kernels here."""
        case, dtype = self._case, self._dtype
        name = f"{case.name}, {str(dtype).removeprefix('torch.')}"
        for slot, factors in self._factors.items():
            self._put(slot, factors)
        plain = self._run(case.runs, self._x, self._y)
        checks = [bounded(name, relative_error(plain, self._exact()), BOUNDS[dtype])]
        if getattr(self._layer, "fuses_vectors", False):
            num_slots = 1 + max(case.ranks)
            tables = tuple(1 + 0.1 * self._small(num_slots, case.num_out).float() for _ in range(2))
            scale, shift = (table.to(dtype) for table in tables)
            fused = self._run(case.runs, self._x, self._y, scale, shift)
            checks.append(
                bounded(
                    f"{name}: with scale and shift", relative_error(fused, self._exact(scale, shift)), BOUNDS[dtype]
                )
            )
        checks.append(Check(name=f"{name}: a token by itself has the same bits", passed=self._alone(plain)))
        checks.append(Check(name=f"{name}: the base's tokens keep their bits", passed=self._base_is_kept(plain)))
        first = min(case.ranks)
        self._layer.drop(first)
        gone = self._run(tuple(run for run in case.runs if run[0] != first), self._x, self._y)
        self._put(first, self._factors[first])
        again = self._run(case.runs, self._x, self._y)
        is_as_before = torch.equal(again, plain) and not torch.equal(gone, plain)
        checks.append(Check(name=f"{name}: an adapter that left and came back", passed=is_as_before))
        for slot in case.ranks:
            self._layer.drop(slot)
        return checks

    def _run(
        self, runs: Runs, x: Tensor, y: Tensor, scale: Tensor | None = None, shift: Tensor | None = None
    ) -> Tensor:
        device = self._ground.device
        given, out = x.to(device), y.to(device, copy=True)
        vectors = [] if scale is None or shift is None else [scale.to(device), shift.to(device)]
        self._layer.op(Segments(runs, len(x)), *vectors)(out, given)
        return out.cpu()

    def _exact(self, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        exact = self._y.double()
        for slot, first, last in self._case.runs:
            a, b = (each.double() for each in self._factors[slot])
            low = (self._x[first:last].double() @ a.t()).to(self._dtype).double()
            own = exact[first:last] if scale is None else exact[first:last] * scale[slot].double()
            exact[first:last] = own + low @ b.t() + (0 if shift is None else shift[slot].double())
        return exact

    def _alone(self, together: Tensor) -> bool:
        """The first and the last token of every run, each in a step of its own."""
        same = []
        for slot, first, last in self._case.runs:
            for token in {first, last - 1}:
                part = slice(token, token + 1)
                own = self._run(((slot, 0, 1),), self._x[part], self._y[part])
                # Under the interpreter it is numpy that multiplies, which rounds by where a row stands.
                same.append(torch.equal(own, together[part]) or not self._ground.is_gpu)
        return all(same)

    def _base_is_kept(self, out: Tensor) -> bool:
        adapted = {token for _, first, last in self._case.runs for token in range(first, last)}
        base = [token for token in range(len(out)) if token not in adapted]
        return torch.equal(out[base], self._y[base])

    def _put(self, slot: int, factors: tuple[Tensor, Tensor]) -> None:
        self._layer.put(slot, *(each.to(self._ground.device) for each in factors))

    def _drawn(self, rank: int) -> tuple[Tensor, Tensor]:
        return self._small(rank, self._case.num_in), self._small(self._case.num_out, rank)

    def _small(self, *size: int) -> Tensor:
        """Numbers whose products stay near one."""
        return (torch.randn(size, generator=self._generator) * pow(size[-1], -0.25)).to(self._dtype)
