"""In a step the host waits for the device once, whatever its rows ask for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from peft_serve.core import Draw, RequestId, Row, SamplingParams, Step
from peft_serve.model.base import ResidentBase
from peft_serve.model.bringing import Bringing
from peft_serve.model.runner import StepRunner
from tests.model.tiny_models import VOCAB, tiny

_READS = frozenset({"tolist", "item", "cpu", "numpy", "__bool__", "__float__", "__int__", "nonzero", "masked_select"})
_SENDS = frozenset({"new_tensor"})


class Listening(TorchFunctionMode):
    """Hears of what a GPU's host waits for: reading, indices that are lists, and numbers that it sends unpinned."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[str] = []

    def __torch_function__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in _READS or name in _SENDS:
            self.heard.append(name)
        if name in {"__getitem__", "__setitem__"}:
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            is_slow = any(isinstance(i, list) or (isinstance(i, Tensor) and i.dtype is torch.bool) for i in index)
            self.heard += ["slow index"] if is_slow else []
        return func(*args, **(kwargs or {}))


def draw(**more: Any) -> Draw:
    fields = {name: more.pop(name) for name in ("forced", "suppress", "allowed", "num_candidates") if name in more}
    return Draw(params=SamplingParams(**more), seed=3, index=1, prompt_history=(4,), output_history=(5, 5), **fields)


DRAWS = (
    draw(),
    draw(do_sample=True, temperature=0.7, top_k=5),
    draw(do_sample=True, top_p=0.8, min_p=0.01, typical_p=0.9, logprobs=True),
    draw(repetition_penalty=1.3, frequency_penalty=0.2, logit_bias=((7, 1.5),), suppress=(9,)),
    draw(logprobs=True, num_top_logprobs=4),
    draw(forced=11, logprobs=True),
    draw(allowed=bytes([0b00001100] * 12), num_top_logprobs=3),
    draw(num_candidates=6, num_top_logprobs=2, num_beams=3),
)


def rows() -> tuple[Row, ...]:
    drawing = [
        Row(request=RequestId(str(i)), slot=0, tokens=(8 + i,), start=0, blocks=(1 + i,), draw=one)
        for i, one in enumerate(DRAWS)
    ]
    scored = Row(
        request=RequestId("scored"),
        slot=0,
        tokens=(5, 6, 7),
        start=0,
        blocks=(20,),
        wanted=((6, 1), (7,), ()),
        num_wanted_top=2,
    )
    return (*drawing, scored)


def test_a_step_waits_once_for_all_that_its_rows_ask() -> None:
    base = ResidentBase(tiny("llama"), name="llama")
    runner = StepRunner(base, num_blocks=40, num_cross_blocks=0, block_size=4, adapters=lambda _: _none())
    with Listening() as listening:
        done = runner.run(Step(id=1, rows=rows()))
    assert listening.heard == ["tolist"]
    assert all(result.failure is None for result in done.rows)
    chosen = {result.request: result for result in done.rows}
    assert chosen[RequestId("5")].token == 11
    assert len(chosen[RequestId("6")].top) == 3
    assert len(chosen[RequestId("7")].candidates) == 6
    assert [len(each) for each in chosen[RequestId("scored")].scores] == [2, 1, 0]
    assert [len(each) for each in chosen[RequestId("scored")].score_tops] == [2, 2, 0]


def test_what_the_host_has_to_do_is_done_before_it_waits() -> None:
    base = ResidentBase(tiny("llama"), name="llama")
    apart, plain = (
        StepRunner(
            base, num_blocks=40, num_cross_blocks=0, block_size=4, adapters=lambda _: _none(), works_apart=is_apart
        )
        for is_apart in (True, None)
    )
    assert not plain.overlap(lambda: pytest.fail("a CPU is busy with the step")), "there is nothing to wait for"
    with Listening() as listening:
        assert apart.overlap(lambda: listening.heard.append("meanwhile"))
        done = apart.run(Step(id=1, rows=rows()))
    assert listening.heard == ["meanwhile", "tolist"]
    assert done == plain.run(Step(id=1, rows=rows()))


def _none() -> Any:
    raise LookupError("no adapter is installed here")


def test_what_is_brought_is_whose_it_was() -> None:
    bringing = Bringing()
    ids, rows_23 = bringing.add(torch.tensor([VOCAB, 2**40])), bringing.add(torch.arange(6.0).view(2, 3))
    nothing = bringing.add(torch.empty(0, 3))
    bringing.bring()
    assert [int(i) for i in ids.numbers] == [VOCAB, 2**40]
    assert rows_23.rows() == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]
    assert nothing.rows() == []
