"""Attention over blocks by torch's own function: what it is told of a plan, with a stand-in that computes it."""

from __future__ import annotations

import inspect
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from loadtest.gpu.attention_cases import CASES, LAYER, Case, Made
from loadtest.gpu.attention_checks import over_blocks, relative_error
from loadtest.gpu.ground import Ground
from loadtest.gpu.varlen import side_by_side
from peft_serve.kernels import varlen
from peft_serve.kernels.varlen import NoVarlen, Varlen, open_varlen, varlen_function
from peft_serve.model.attend import Terms, attend_reference
from peft_serve.model.pools import KVPool
from peft_serve.model.ragged import Plan
from peft_serve.model.varlen_attention import FirstThatCan, VarlenPlans

CPU = torch.device("cpu")
SERVED = {"rows of all lengths", "decode", "a window (Mistral)", "over an encoded source"}


def varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    *,
    return_aux: object = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
) -> Tensor:
    """What torch's documentation says of the function, row by row."""
    out, scaling = torch.empty_like(query), query.shape[2] ** -0.5 if scale is None else scale
    begins = cu_seq_q.tolist()
    assert cu_seq_q.dtype is torch.int32
    assert max(b - a for a, b in pairwise(begins)) == max_q
    assert (block_table is None) == (seqused_k is None) != (cu_seq_k is None)
    for row, (first, last) in enumerate(pairwise(begins)):
        if block_table is not None and seqused_k is not None:
            assert block_table.dtype is seqused_k.dtype is torch.int32
            used = int(seqused_k[row])
            k, v = (each[block_table[row].long()].flatten(0, 1)[:used] for each in (key, value))
        else:
            assert cu_seq_k is not None
            k, v = (each[int(cu_seq_k[row]) : int(cu_seq_k[row + 1])] for each in (key, value))
        assert len(k) <= max_k
        groups = query.shape[1] // k.shape[1]
        assert enable_gqa == (groups > 1)
        k, v = (each.repeat_interleave(groups, dim=1).float() for each in (k, v))
        scores = torch.einsum("qhd,khd->hqk", query[first:last].float(), k) * scaling
        query_at = torch.arange(last - first)[:, None] + len(k) - (last - first)
        key_at = torch.arange(len(k))[None]
        left, right = window_size
        hidden = (key_at > query_at + right) & (right >= 0) | (key_at < query_at - left) & (left >= 0)
        out[first:last] = torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)
    return out


def test_the_stand_in_takes_what_torchs_function_takes() -> None:
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 12):
        with pytest.raises(NoVarlen, match="takes no block table"):
            varlen_function()
        return
    real = varlen_function()
    assert list(inspect.signature(real).parameters) == list(inspect.signature(varlen_attn).parameters)


def computed(case: Case, dtype: torch.dtype = torch.bfloat16) -> float | None:
    """The error over the largest number, or None where the case is left to others."""
    made = Made(case, dtype, is_quick=True)
    given, exact = made.on(CPU, dtype), made.on(CPU, torch.float32)
    out = VarlenPlans(varlen_attn).attend(given.plan, given.pool, given.q, given.k, given.v, LAYER, given.terms)
    if out is None:
        return None
    truth = attend_reference(exact.plan, exact.q, exact.k, exact.v, exact.pool, LAYER, exact.terms)
    return relative_error(out, truth)


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_what_is_covered_is_right_and_the_rest_is_left(case: Case) -> None:
    error = computed(case)
    if case.name in SERVED:
        assert error is not None
    if case.softcap or case.bias or case.has_sinks or case.rows in ("encoder", "front"):
        assert error is None
    assert error is None or error < 1e-2
    assert computed(case, torch.float32) is None


def test_keys_in_front_are_read_unless_a_layer_has_none() -> None:
    made = Made(Case(name="unplaced", rows="unplaced"), torch.bfloat16, is_quick=False)
    spans = made.spans
    given = made.on(CPU, torch.bfloat16)
    assert any(span.absent for span in spans)
    call = (given.pool, given.q, given.k, given.v, LAYER, given.terms)
    assert VarlenPlans(varlen_attn).attend(given.plan, *call) is None
    everywhere = replace(given.plan, spans=tuple(replace(span, absent=frozenset()) for span in spans))
    assert any(span.num_unplaced for span in everywhere.spans)
    out = VarlenPlans(varlen_attn).attend(everywhere, *call)
    exact = made.on(CPU, torch.float32)
    plan = replace(exact.plan, spans=everywhere.spans)
    truth = attend_reference(plan, exact.q, exact.k, exact.v, exact.pool, LAYER, exact.terms)
    assert out is not None
    assert relative_error(out, truth) < 1e-2


def test_the_check_of_a_gpu_sees_an_error() -> None:
    ground = Ground(device=CPU, is_quick=True)
    closed: list[int] = []
    right = over_blocks(ground, lambda _: Varlen(varlen_attn, lambda: closed.append(1)))
    assert [check.passed for check in right[0]] == [True]
    assert closed == [1]
    wrong = over_blocks(ground, lambda _: Varlen(lambda *a, **k: varlen_attn(*a, **k).roll(1, 0), lambda: None))
    assert [check.passed for check in wrong[0]] == [False]
    assert over_blocks(ground)[0] == []


def test_keys_side_by_side_give_the_same() -> None:
    made = Made(CASES[0], torch.float32, is_quick=True)
    given = made.on(CPU, torch.float32)
    assert given.pool is not None
    given.pool.layer(0)[0].copy_(given.pool.layer(LAYER)[0])
    given.pool.layer(0)[1].copy_(given.pool.layer(LAYER)[1])
    act = side_by_side(given.plan, given.pool, given.q, given.terms, varlen_attn)
    assert act is not None
    truth = attend_reference(given.plan, given.q, given.k, given.v, given.pool, LAYER, given.terms)
    assert relative_error(act(), truth) < 1e-5

    def fails(*_: object, **__: object) -> Tensor:
        raise RuntimeError("no kernel image")

    assert side_by_side(given.plan, given.pool, given.q, given.terms, fails) is None
    assert side_by_side(given.plan, given.pool, given.q, given.terms) is None


class Asked:
    """A kernel that gives what it is told to, and keeps count."""

    def __init__(self, gives: Tensor | None) -> None:
        self.gives = gives
        self.num_asked = self.num_forgot = 0

    def forget(self) -> None:
        self.num_forgot += 1

    def attend(
        self, plan: Plan, pool: KVPool | None, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, layer: int, terms: Terms
    ) -> Tensor | None:
        self.num_asked += 1
        return self.gives


def test_the_first_kernel_that_can_is_taken() -> None:
    given: Any = Made(CASES[0], torch.float32, is_quick=True).on(CPU, torch.float32)
    none, first, second = Asked(None), Asked(torch.ones(1)), Asked(torch.zeros(1))
    call = (given.plan, given.pool, given.q, given.k, given.v, LAYER, given.terms)
    both = FirstThatCan((none, first, second))
    assert both.attend(*call) is first.gives
    assert (none.num_asked, first.num_asked, second.num_asked) == (1, 1, 0)
    both.forget()
    assert [each.num_forgot for each in (none, first, second)] == [1, 1, 1]
    assert FirstThatCan((none,)).attend(*call) is None


def test_it_is_said_why_it_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def old(query: Tensor, window_size: tuple[int, int] = (-1, -1)) -> Tensor:
        return query

    cuda = torch.device("cuda")
    monkeypatch.setattr(varlen, "import_module", lambda _: type("Module", (), {"varlen_attn": staticmethod(old)}))
    with pytest.raises(NoVarlen, match=r"takes no block table; that of 2\.12 does"):
        open_varlen(cuda)
    monkeypatch.setattr(varlen, "varlen_function", lambda: varlen_attn)
    with pytest.raises(NoVarlen, match="for GPUs"):
        open_varlen(CPU)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    with pytest.raises(NoVarlen, match=r"capability 9\.0"):
        open_varlen(cuda)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(varlen, "find_spec", lambda _: None)
    with pytest.raises(NoVarlen, match=r"FlashAttention-3 \(flash_attn_interface\) is not installed"):
        open_varlen(cuda)

    class Switches:
        def __init__(self) -> None:
            self.asked: list[str] = []

        def activate_flash_attention_impl(self, name: str) -> None:
            self.asked.append(name)
            if len(self.asked) > 1:
                raise RuntimeError("no kernels")

        def restore_flash_attention_impl(self) -> None:
            self.asked.append("back")

    switches = Switches()
    monkeypatch.setattr(varlen, "find_spec", lambda _: object())
    monkeypatch.setattr(varlen, "import_module", lambda _: switches)
    opened = open_varlen(cuda)
    assert opened.attend is varlen_attn
    with pytest.raises(NoVarlen, match=r"does not load \(RuntimeError: no kernels"):
        open_varlen(cuda)
    opened.close()
    assert switches.asked == ["FA3", "FA3", "back"]
