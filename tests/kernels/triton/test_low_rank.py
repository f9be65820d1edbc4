"""Low-rank terms in Triton, by its interpreter: right for any ranks and segments, whatever else is in the step."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from peft_serve.kernels import reference
from peft_serve.kernels.low_rank import Segments
from tests.kernels.triton.interpreter import DEVICE, IS_INTERPRETED

pytest.importorskip("triton", reason="Triton is not installed")

from peft_serve.kernels.triton import shrinking, tiles
from peft_serve.kernels.triton.low_rank import LayerFactors, LongRuns, LowRankKernel
from peft_serve.kernels.triton.shrinking import DTYPES
from peft_serve.kernels.triton.tiles import MANY, tiles_of

HERE = torch.device(DEVICE)
RANKS = {1: 1, 2: 8, 3: 3, 5: 16, 6: 13, 7: 64, 9: 17}  # by slot; slots 4 and 8 have nothing here
ROOM = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""Of the largest result: A x and y are rounded."""
Row = tuple[int, int, int]


class _Layer:
    """A layer with its adapters, and what its terms should be beside it."""

    def __init__(self, kernel: LowRankKernel, num_in: int, num_out: int, dtype: torch.dtype = torch.float32) -> None:
        self._rng = torch.Generator().manual_seed(num_in + num_out)
        self.sizes, self.dtype = (num_in, num_out), dtype
        self.factors: LayerFactors = kernel.layer(num_in, num_out, dtype, "model.layer")
        self.pairs: dict[int, tuple[Tensor, Tensor]] = {}

    def random(self, *size: int) -> Tensor:
        return torch.randn(size, generator=self._rng).to(HERE, self.dtype)

    def put(self, slot: int, rank: int) -> None:
        num_in, num_out = self.sizes
        self.pairs[slot] = self.random(rank, num_in), self.random(num_out, rank)
        self.factors.put(slot, *self.pairs[slot])

    def drop(self, slot: int) -> None:
        del self.pairs[slot]
        self.factors.drop(slot)

    def expected(self, y_TO: Tensor, x_TI: Tensor, rows: list[Row]) -> Tensor:
        factors = {slot: (a.double(), b.double()) for slot, (a, b) in self.pairs.items()}
        return reference.low_rank(y_TO.double(), x_TI.double(), _runs(rows, len(y_TO)), factors)

    def expect(self, rows: list[Row], num_tokens: int) -> None:
        """What the op does to random rows is what it should; tokens without an adapter keep their bits."""
        x_TI, y_TO = self.random(num_tokens, self.sizes[0]), self.random(num_tokens, self.sizes[1])
        expected_TO, before_TO = self.expected(y_TO, x_TI, rows), y_TO.clone()
        self.factors.op(Segments(rows, num_tokens))(y_TO, x_TI)
        room = ROOM[self.dtype] * float(expected_TO.abs().max())
        torch.testing.assert_close(y_TO.double(), expected_TO, rtol=0, atol=room)
        own = {token for slot, first, last in rows if slot in self.pairs for token in range(first, last)}
        others = [token for token in range(num_tokens) if token not in own]
        assert torch.equal(y_TO[others], before_TO[others])


def _runs(rows: list[Row], num_tokens: int) -> list[tuple[int, int]]:
    runs, at = [], 0
    for slot, first, last in rows:
        runs += [(0, first - at), (slot, last - first)]
        at = last
    return [*runs, (0, num_tokens - at)]


def _layer(
    num_in: int, num_out: int, dtype: torch.dtype = torch.float32, part: int = 512
) -> tuple[LowRankKernel, _Layer]:
    kernel = LowRankKernel(HERE, part=part)
    layer = _Layer(kernel, num_in, num_out, dtype)
    for slot, rank in RANKS.items():
        layer.put(slot, rank)
    return kernel, layer


STEPS: list[tuple[list[Row], int]] = [
    ([(slot, slot, slot + 1) for slot in (1, 3, 4, 7, 9)], 11),  # decode, with tokens of the base around and between
    ([(4, 0, 3)], 4),  # an adapter that has nothing here
    ([(1, 1, 3), (2, 3, 20), (3, 20, 24), (5, 25, 31), (9, 31, 36), (2, 38, 40)], 41),
    ([(7, 0, 70), (2, 70, 71), (6, 71, 80)], 82),  # a prefill
]


@pytest.mark.parametrize(("dtype", "sizes"), [(torch.float32, (200, 140)), *((dtype, (40, 24)) for dtype in DTYPES)])
def test_every_token_gets_the_term_of_its_adapter(dtype: torch.dtype, sizes: tuple[int, int]) -> None:
    _, layer = _layer(*sizes, dtype, part=64)
    for rows, num_tokens in STEPS[:: 3 if sizes[0] > 100 else 1]:
        layer.expect(rows, num_tokens)


def test_random_steps_with_slots_that_come_and_go() -> None:
    rng = random.Random(7)
    kernel, layer = _layer(48, 40)
    for _ in range(5):
        for slot in rng.sample(range(1, 300), 3) + rng.sample(sorted(layer.pairs), 2):
            if slot in layer.pairs:
                layer.drop(slot)
            else:
                layer.put(slot, rng.randint(1, 64))
        rows, at = [], 0
        for slot in rng.sample(sorted(layer.pairs), 4):
            first = at + rng.choice([0, 0, 1, 2])
            at = first + rng.choice([1, 1, 2, 5, 17])
            rows.append((slot, first, at))
        layer.expect(rows, at + rng.randint(0, 2))
    held = sum((a.numel() + b.numel()) * 4 for a, b in layer.pairs.values())
    assert held <= kernel.memory.slabs.num_used <= held + 256 * len(layer.pairs)
    for slot in sorted(layer.pairs):
        layer.drop(slot)
    assert (kernel.memory.slabs.num_used, kernel.memory.slabs.num_held) == (0, 0)


def test_a_slot_that_was_emptied_or_given_to_another_leaves_nothing() -> None:
    _, layer = _layer(20, 12)
    rows = [(2, 0, 2), (1, 2, 3)]
    layer.expect(rows, 4)
    layer.drop(2)
    layer.factors.drop(4)  # had nothing
    layer.expect(rows, 4)
    layer.put(2, 3)
    layer.put(1, 20)  # in place of another
    layer.expect(rows, 4)


def test_a_token_has_the_same_bits_in_any_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever is beside it, whether tiles are high or low, and one program sums its inputs or several do."""
    if IS_INTERPRETED:
        _sum_in_order(monkeypatch)
    _, layer = _layer(200, 40, part=64)
    x_TI, y_TO = layer.random(20, 200), layer.random(20, 40)
    for slot in (1, 9):
        alone_TO = y_TO.clone()
        for token in (0, 3, 7):
            layer.factors.op(Segments([(slot, 0, 1)], 1))(alone_TO[token], x_TI[token])
        for enough_programs, long in ((256, 64), (1, 64), (1, 4)):
            monkeypatch.setattr(shrinking, "_ENOUGH_PROGRAMS", enough_programs)
            monkeypatch.setattr(tiles, "_LONG", long)
            together_TO = y_TO.clone()
            layer.factors.op(Segments([(slot, 0, 8), (5, 8, 9)], 20))(together_TO, x_TI)
            for token in (0, 3, 7):
                assert torch.equal(together_TO[token], alone_TO[token]), (slot, enough_programs, long)


def _sum_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """A product whose sums have one order wherever a row stands, as a GPU's have and numpy's have not."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def dot(self: object, a: Any, b: Any, total: Any, *how: object) -> Any:
        products = a.data[:, :, None] * b.data[None]
        return TensorHandle(np.add.accumulate(products, axis=1)[:, -1] + total.data, total.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", dot)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy says what happens
def test_what_is_not_finite_stays_with_its_adapter() -> None:
    _, layer = _layer(40, 24)
    layer.factors.put(2, torch.full((8, 40), 3e38, device=HERE), torch.full((24, 8), 3e38, device=HERE))
    x_TI, y_TO = layer.random(9, 40).abs(), layer.random(9, 24)
    x_TI[1] = float("nan")
    rows = [(1, 0, 3), (2, 3, 6), (3, 6, 9)]
    expected_TO = layer.expected(y_TO, x_TI, rows)
    layer.factors.op(Segments(rows, 9))(y_TO, x_TI)
    assert not y_TO[[1, 3, 4, 5]].isfinite().any()
    others = [0, 2, 6, 7, 8]
    torch.testing.assert_close(y_TO[others], expected_TO[others].float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("has_scale", "has_shift"), [(True, True), (True, False), (False, True)])
def test_vectors_beside_the_term_are_one_op_with_it(has_scale: bool, has_shift: bool) -> None:
    _, layer = _layer(40, 24)
    scale_SO, shift_SO = layer.random(10, 24), layer.random(10, 24)
    x_TI, y_TO = layer.random(12, 40), layer.random(12, 24)
    rows = [(1, 0, 3), (4, 3, 6), (9, 7, 12)]  # slot 4 has no low-rank term, token 6 no adapter
    runs = _runs(rows, 12)
    vectors = [{slot: table[slot] for slot in (1, 4, 9)} for table in (scale_SO, shift_SO)]
    expected_TO = reference.scale(y_TO, runs, vectors[0]) if has_scale else y_TO
    expected_TO = layer.expected(expected_TO, x_TI, rows).float()
    expected_TO = reference.shift(expected_TO, runs, vectors[1]) if has_shift else expected_TO
    layer.factors.op(Segments(rows, 12), scale_SO if has_scale else None, shift_SO if has_shift else None)(y_TO, x_TI)
    torch.testing.assert_close(y_TO, expected_TO, rtol=1e-5, atol=1e-5)


class _Counting:
    """Launches of a kernel, and how many layers each served."""

    def __init__(self, kernel: object) -> None:
        self._kernel = kernel
        self.members: list[int] = []

    def __getitem__(self, grid: tuple[int, int, int]) -> object:
        self.members.append(grid[2])
        return self._kernel[grid]  # type: ignore[index]


def test_layers_that_read_one_input_share_a_shrink(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = LowRankKernel(HERE)
    q, k, v, o = (_Layer(kernel, 40, size) for size in (40, 24, 24, 40))
    for rank, layer in enumerate((q, v, o), start=3):  # nobody has anything at k
        layer.put(1, rank)
    counting = _Counting(shrinking.shrink)
    monkeypatch.setattr(shrinking, "shrink", counting)
    rows = [(1, 0, 3)]
    segments = Segments(rows, 3)
    ops = {layer: layer.factors.op(segments) for layer in (q, k, v, o)}
    for expected_members in ([1, 2, 3, 1], [3, 1], [3, 1]):  # seen first, then shared
        counting.members.clear()
        x_TI, attended_TI = q.random(3, 40), q.random(3, 40)
        for layer, x in ((q, x_TI), (k, x_TI), (v, x_TI.view(1, 3, 40)), (o, attended_TI)):
            y_TO = layer.random(3, layer.sizes[1])
            expected_TO = layer.expected(y_TO, x.view(3, 40), rows)
            ops[layer](y_TO, x)
            torch.testing.assert_close(y_TO, expected_TO.float(), rtol=1e-5, atol=1e-5)
        assert counting.members == expected_members


def test_the_same_memory_with_other_contents_is_shrunk_anew() -> None:
    """As a captured input is, which every step writes to one place."""
    _, layer = _layer(40, 24)
    x_TI, rows = torch.empty(2, 40, device=HERE), [(5, 0, 2)]
    op = layer.factors.op(Segments(rows, 2))
    for _ in range(3):
        x_TI.copy_(layer.random(2, 40))
        y_TO = layer.random(2, 24)
        expected_TO = layer.expected(y_TO, x_TI, rows)
        op(y_TO, x_TI)
        torch.testing.assert_close(y_TO, expected_TO.float(), rtol=1e-5, atol=1e-5)


def test_ops_made_once_serve_any_mix_of_adapters_in_a_bucket() -> None:
    """What a CUDA graph needs: other adapters come and go, and nothing but the contents of memory changes."""
    kernel, layer = _layer(40, 24)
    bucket = kernel.bucket(8, max_rank=64)
    op = layer.factors.op(bucket)
    kernel.fill(bucket, Segments([], 0))
    at = kernel.memory.entries.table.data_ptr(), bucket.tiles.table_N3.data_ptr()
    crowd = [(slot, slot - 1, slot) for slot in range(1, 9)]
    for rows in ([(7, 0, 2), (1, 2, 3)], [], [(11, 0, 8)], crowd, [(2, 7, 8)]):
        layer.put(11, 33 + len(rows))
        kernel.fill(bucket, Segments(rows, rows[-1][2] if rows else 0))
        x_TI, y_TO = layer.random(8, 40), layer.random(8, 24)
        expected_TO = layer.expected(y_TO, x_TI, rows)
        op(y_TO, x_TI)
        torch.testing.assert_close(y_TO, expected_TO.float(), rtol=1e-5, atol=1e-5)
    assert (
        kernel.memory.entries.table.data_ptr(),
        bucket.tiles.table_N3.data_ptr(),
        kernel.memory.entries.num_moves,
    ) == (*at, 1)
    with pytest.raises(ValueError, match="9 tokens do not fit a bucket of 8"):
        kernel.fill(bucket, Segments([(1, 0, 9)], 9))
    layer.put(12, 65)
    with pytest.raises(ValueError, match="rank 65 does not fit a bucket for ranks up to 64"):
        kernel.fill(bucket, Segments([(12, 0, 1)], 1))


def test_grouped_products_of_long_runs_are_the_second_way_to_the_same() -> None:
    rows = [(7, 0, 70), (2, 70, 71), (4, 71, 72), (6, 73, 90), (5, 90, 92)]
    x_TI, y_TO, results = None, None, []
    for long_runs in LongRuns:
        kernel = LowRankKernel(HERE, long_runs=long_runs)
        layer = _Layer(kernel, 40, 24, torch.bfloat16)
        for slot, rank in RANKS.items():
            layer.put(slot, rank)
        assert kernel.groups(layer.factors, tiles_of(Segments(rows, 93), HERE)) == (long_runs is LongRuns.GROUPED)
        assert not kernel.groups(layer.factors, tiles_of(Segments([(1, 0, 2)], 2), HERE)), "short runs are tiles"
        if x_TI is None or y_TO is None:
            x_TI, y_TO = layer.random(93, 40), layer.random(93, 24)
        result_TO, expected_TO = y_TO.clone(), layer.expected(y_TO, x_TI, rows)
        layer.factors.op(Segments(rows, 93))(result_TO, x_TI)
        room = ROOM[torch.bfloat16] * float(expected_TO.abs().max())
        torch.testing.assert_close(result_TO.double(), expected_TO, rtol=0, atol=room)
        assert torch.equal(result_TO[71:73], y_TO[71:73])
        results.append(result_TO)
    torch.testing.assert_close(results[0], results[1], rtol=2e-2, atol=room)


def test_memory_that_was_made_in_inference_mode_is_written_outside_too() -> None:
    with torch.inference_mode():
        kernel, layer = _layer(20, 12)
        layer.put(700, 3)
        bucket = kernel.bucket(2, max_rank=64)
        kernel.fill(bucket, Segments([(5, 0, 1)], 1))
    layer.put(1, 5)
    layer.put(900, 3)
    kernel.fill(bucket, Segments([(1, 0, 2)], 2))
    layer.expect([(1, 0, 2), (900, 2, 3)], 4)


def test_tensors_with_gaps_and_of_another_type_are_taken_too() -> None:
    _, layer = _layer(20, 12)
    wide_TI, wide_TO, rows = layer.random(6, 40), layer.random(6, 24), [(5, 0, 6)]
    x_TI, y_TO = wide_TI[:, ::2], wide_TO[:, :12]
    expected_TO, beside_TO = layer.expected(y_TO, x_TI, rows), wide_TO[:, 12:].clone()
    layer.factors.op(Segments(rows, 6))(y_TO, x_TI)
    torch.testing.assert_close(y_TO, expected_TO.float(), rtol=1e-5, atol=1e-5)
    assert torch.equal(wide_TO[:, 12:], beside_TO)
    half_TO, half_TI = torch.zeros(1, 6, 12, dtype=torch.bfloat16, device=HERE), x_TI.to(torch.bfloat16)
    layer.factors.op(Segments(rows, 6))(half_TO, half_TI[None])
    expected_TO = layer.expected(torch.zeros_like(x_TI[:, :12]), half_TI, rows)
    torch.testing.assert_close(half_TO[0], expected_TO.to(torch.bfloat16))


def test_another_number_of_tokens_is_refused() -> None:
    _, layer = _layer(20, 12)
    with pytest.raises(ValueError, match="factors for 3 tokens got"):
        layer.factors.op(Segments([(1, 0, 3)], 3))(torch.zeros(2, 12, device=HERE), torch.zeros(2, 20, device=HERE))


def test_tiles_are_high_where_a_segment_is_long() -> None:
    many = tiles_of(Segments([(2, 0, 70), (5, 71, 73)], 80), HERE)
    assert many.height == MANY
    assert many.table_N3.tolist() == [[2, 0, 64], [2, 64, 6], [5, 71, 2]]
    few = tiles_of(Segments([(2, 0, 20), (5, 21, 22)], 22), HERE)
    assert few.table_N3.tolist() == [[2, 0, 16], [2, 16, 4], [5, 21, 1]]
