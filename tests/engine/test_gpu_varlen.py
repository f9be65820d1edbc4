"""torch's attention over blocks takes the place of ours only where it is right and faster in both kinds of steps."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from peft_serve.engine.gpu_varlen import Act, choose_attention
from peft_serve.kernels.varlen import NoVarlen, Varlen
from peft_serve.model.attend import Terms, attend_reference
from peft_serve.model.attention import PlanKernel
from peft_serve.model.base import ResidentBase
from peft_serve.model.pools import KVPool
from peft_serve.model.ragged import Plan
from peft_serve.model.varlen_attention import FirstThatCan, VarlenPlans
from tests.model.test_varlen_attention import varlen_attn
from tests.model.tiny_models import tiny

STEPS = {"decode": (3, 1, 20), "a prompt": (1, 5, 9)}


class Ours:
    """The reference in place of our kernel."""

    def forget(self) -> None: ...

    def attend(
        self, plan: Plan, pool: KVPool | None, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, layer: int, terms: Terms
    ) -> Tensor | None:
        return attend_reference(plan, q_THD, k_TKD, v_TKD, pool, layer, terms)


class Trial:
    """A base, and what came of it."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        self.base = ResidentBase(tiny("llama").to(dtype), name="tiny")
        self.said: list[str] = []
        self.closed = 0

    def close(self) -> None:
        self.closed += 1

    def chosen(
        self,
        attend: Callable[..., Tensor] = varlen_attn,
        takes: tuple[float, ...] = (2.0, 1.0, 2.0, 1.0),
        reason: str | None = None,
    ) -> PlanKernel:
        times = iter(takes)

        def load(_: torch.device) -> Varlen:
            if reason is not None:
                raise NoVarlen(reason)
            return Varlen(attend, self.close)

        def seconds(act: Act) -> float:
            assert isinstance(act(), Tensor)
            return next(times)

        return choose_attention(self.base, Ours(), self.said.append, load=load, seconds=seconds, steps=STEPS)


def test_it_is_taken_where_it_is_right_and_faster() -> None:
    trial = Trial()
    chosen = trial.chosen()
    assert isinstance(chosen, FirstThatCan)
    assert [type(kernel) for kernel in chosen._kernels] == [VarlenPlans, Ours]
    assert trial.closed == 0
    assert len(trial.said) == 1


@pytest.mark.parametrize(
    ("takes", "reason"), [((2.0, 3.0), "decode takes it 1.50"), ((2.0, 1.0, 1.0, 1.0), "a prompt takes it 1.00")]
)
def test_it_is_left_where_a_step_is_no_faster(takes: tuple[float, ...], reason: str) -> None:
    trial = Trial()
    assert isinstance(trial.chosen(takes=takes), Ours)
    assert trial.closed == 1
    assert reason in trial.said[0]


def test_it_is_left_where_it_is_wrong_or_breaks() -> None:
    trial = Trial()

    def breaks(*_: object, **__: object) -> Tensor:
        raise ValueError("no such page size")

    assert isinstance(trial.chosen(lambda *a, **k: varlen_attn(*a, **k).roll(1, 0)), Ours)
    assert isinstance(trial.chosen(breaks), Ours)
    assert "decode comes out otherwise, by" in trial.said[0]
    assert "cannot be tried out (ValueError: no such page size)" in trial.said[1]
    assert trial.closed == 2


def test_where_it_is_not_there_nothing_is_said() -> None:
    trial = Trial()
    assert isinstance(trial.chosen(reason="no package"), Ours)
    assert isinstance(Trial(torch.float32).chosen(), Ours), "it computes in half precision alone"
    assert trial.said == []
