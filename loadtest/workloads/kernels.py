"""kernels: our own CPU products beside torch's, for every shape of weight in the base.

The copies of a weight are used in turns, as many as do not fit into a cache, and the ways in turns too, each figure
the least of many repeats: what else runs on the machine slows all of them.
"""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loadtest.report import Cell, Report
from loadtest.stage import Stage

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from loadtest.bound import MachineRates

    Ways = dict[str, Callable[[int, Tensor], object]]

_CACHE_BYTES = 48 << 20
_WAYS = ("ours", "oneDNN packed", "torch")


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One product: the seconds of each way that computes it here."""

    num_out: int
    num_in: int
    num_rows: int
    seconds: dict[str, float]

    def bound_s(self, rates: "MachineRates", itemsize: int) -> float:
        """The weight read once, or every multiplication done once."""
        weights = self.num_out * self.num_in
        return max(weights * itemsize / rates.bytes_per_s, 2 * weights * self.num_rows / rates.flops_per_s)


def run(stage: Stage) -> Report:
    """Measure the machine, then the products."""
    import torch  # with transformers, seconds that the other commands do without

    from loadtest.bound import measure_rates

    options = stage.options
    torch.set_num_threads(options.num_threads)
    dtype = getattr(torch, options.dtype)
    shapes = _shapes(stage)
    all_rows = (1, 4, 16, 32) if options.quick else (1, 2, 4, 8, 16, 32, 64, 256)
    rates = measure_rates(device="cpu", dtype=torch.float32, num_bytes=_CACHE_BYTES * 2, quick=options.quick)
    points = []
    with stage.counting("products", len(shapes) * len(all_rows)) as tick, torch.inference_mode():
        for num_out, num_in in shapes:
            ways, num_copies = _ways(num_out, num_in, dtype)
            for num_rows in all_rows:
                x = torch.randn(num_rows, num_in).to(dtype)
                seconds = _least_s(ways, x, num_copies, repeats=8 if options.quick else 30)
                points.append(Point(num_out=num_out, num_in=num_in, num_rows=num_rows, seconds=seconds))
                tick()
    title = f"kernels: products of {options.base}, {options.dtype}, {options.num_threads} threads, microseconds"
    return report(points, rates, dtype.itemsize, title=title)


def report(points: Sequence[Point], rates: "MachineRates", itemsize: int, *, title: str) -> Report:
    """One row for each weight and number of rows."""
    rows: list[tuple[Cell, ...]] = []
    for one in points:
        bound_s = one.bound_s(rates, itemsize)
        times = tuple(1e6 * one.seconds[way] if way in one.seconds else "" for way in _WAYS)
        best_s = one.seconds.get("ours", min(one.seconds.values()))
        rows.append((f"{one.num_out} x {one.num_in}", one.num_rows, *times, 1e6 * bound_s, best_s / bound_s))
    return Report(
        name="kernels",
        title=title,
        columns=("weight", "rows", *_WAYS, "bound", "ours over bound"),
        rows=tuple(rows),
        notes=(
            f"read {rates.bytes_per_s / 1e9:.3g} GB/s, matrix product {rates.flops_per_s / 1e9:.3g} Gflop/s (float32); "
            "each figure is the least of its repeats; without a compiler the last column is torch's best",
        ),
        settings={"bytes_per_s": rates.bytes_per_s, "flops_per_s": rates.flops_per_s},
    )


def _shapes(stage: Stage) -> list[tuple[int, int]]:
    """[out, in] of every linear layer of the base, the largest last."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(stage.base())
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    linear = (module for module in model.modules() if isinstance(module, torch.nn.Linear))
    return sorted({(m.out_features, m.in_features) for m in linear}, key=lambda shape: shape[0] * shape[1])


def _ways(num_out: int, num_in: int, dtype: "torch.dtype") -> tuple["Ways", int]:
    """Each way as a function of the copy of the weight and the rows."""
    import torch

    from peft_serve.kernels.few_rows import FewRows
    from peft_serve.kernels.native import NativeCode, NativeError, cache_folder, find_compiler
    from peft_serve.model.packing import can_pack, packed_linear

    num_copies = max(2, min(64, _CACHE_BYTES // (num_out * num_in * dtype.itemsize)))
    weights = [torch.randn(num_out, num_in).to(dtype) for _ in range(num_copies)]
    ways: Ways = {"torch": lambda i, x: torch.nn.functional.linear(x, weights[i])}
    try:
        few_rows = FewRows(NativeCode(find_compiler(os.environ), cache_folder(os.environ)))
        ours = [few_rows.linear(weight, None) for weight in weights]
        ways["ours"] = lambda i, x: ours[i](x)
    except NativeError as problem:
        print(f"without our own kernels: {problem}")
    if can_pack(torch.device("cpu"), dtype):
        packed = [packed_linear(weight, None) for weight in weights]
        ways["oneDNN packed"] = lambda i, x: packed[i](x)
    return ways, num_copies


def _least_s(ways: "Ways", x: "Tensor", num_copies: int, *, repeats: int) -> dict[str, float]:
    """Seconds of one product, there and back through the ways."""
    least = dict.fromkeys(ways, float("inf"))
    for repeat in range(repeats + 1):
        for name in list(ways) if repeat % 2 else list(ways)[::-1]:
            act, began = ways[name], time.perf_counter()
            for copy in range(num_copies):
                act(copy, x)
            if repeat:  # the first one warms up
                least[name] = min(least[name], (time.perf_counter() - began) / num_copies)
    return least
