"""Values as large and as small as the gate lets in: their own rows may say nonsense, and no other row changes.

Every served type takes part, each in the same steps as a row of the base and a row of an honest adapter.
`PEFT_SERVE_ATTACKS=all` tries every filling.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from peft_serve.adapters.primitives import Adapter
from peft_serve.adapters.records import CheckpointFiles
from peft_serve.core import BASE, AdapterId, Row, SamplingParams
from peft_serve.errors import AdapterInvalid
from peft_serve.model.base import ResidentBase
from tests.adapters.checkpoints import make_base
from tests.attacks.hostile import admit, honest, with_config
from tests.attacks.subjects import METHOD_OF
from tests.model.driver import Driver, Job

HONEST = AdapterId("honest")
PROMPT = (5, 17, 42, 9, 33)
LARGEST = 65504.0
GAINS: dict[str, float] = {"lora_alpha": 1e6, "alpha": 1e6, "scaling": 1e6, "randlora_alpha": 1e6}


def _largest(tensor: Tensor) -> Tensor:
    """The largest value there is, with both signs."""
    signs = torch.ones(tensor.numel())
    signs[1::3] = -1
    return (LARGEST * signs).reshape(tensor.shape)


FILLINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "largest": _largest,
    "all largest": lambda tensor: torch.full(tensor.shape, LARGEST),
    "denormal": lambda tensor: torch.full(tensor.shape, 1e-44),
    "minus zero": lambda tensor: torch.full(tensor.shape, -0.0),
    "half largest": lambda tensor: _largest(tensor).half(),
}


def filled(files: CheckpointFiles, filling: Callable[[Tensor], Tensor], *, gains: bool) -> CheckpointFiles:
    tensors = load(files.weights)
    values = {name: filling(t) if t.is_floating_point() else t for name, t in tensors.items()}
    weights = save({name: value.contiguous() for name, value in values.items()})
    changed = CheckpointFiles(config=files.config, weights=weights)
    if not gains:
        return changed
    known = {name: value for name, value in GAINS.items() if f'"{name}"'.encode() in files.config}
    return with_config(changed, **known)


def admitted(filling: str, *, gains: bool) -> dict[AdapterId, Adapter]:
    """The hostile adapters of every type that gate and compiler let in."""
    found = {}
    for peft_type, method in METHOD_OF.items():
        try:
            found[AdapterId(peft_type)] = admit(filled(honest(method), FILLINGS[filling], gains=gains))
        except AdapterInvalid:
            continue
    return found


class WildDriver(Driver):
    """Rows of hostile adapters are sampled; the golden ones are greedy."""

    def _row(self, job: Job, chunk: int, copies: list[tuple[int, int]], name: str) -> Row:
        row = super()._row(job, chunk, copies, name)
        if row.draw is None or job.adapter in (BASE, HONEST):
            return row
        params = SamplingParams(temperature=1.0, top_k=5, top_p=0.9, do_sample=True, logprobs=True)
        return replace(row, draw=replace(row.draw, params=params))


def golden(adapters: Iterable[tuple[AdapterId, Adapter]]) -> tuple[list[list[int]], list[list[float]]]:
    """Tokens and log-probabilities of the two golden rows, beside one row of each of the adapters."""
    base = ResidentBase(make_base("llama"), name="llama")
    fingerprint = base.fingerprint()
    known: dict[AdapterId, Adapter] = {HONEST: admit(honest()), **dict(adapters)}
    driver = WildDriver(base, known, seed=3, num_blocks=900)
    driver.install(*known)
    jobs = [Job(prompt=PROMPT, num_new=5), Job(prompt=PROMPT, num_new=5, adapter=HONEST)]
    others = [Job(prompt=PROMPT, num_new=5, adapter=adapter) for adapter in known if adapter != HONEST]
    driver.finish([*jobs, *others])
    assert base.fingerprint() == fingerprint
    assert all(len(job.output) == 5 for job in others)
    return [job.output for job in jobs], [job.logprobs for job in jobs]


EVERY = [(filling, gains) for filling in FILLINGS for gains in (False, True)]
TELLING = [("largest", False), ("all largest", True)]


@pytest.mark.parametrize(("filling", "gains"), EVERY if os.environ.get("PEFT_SERVE_ATTACKS") == "all" else TELLING)
def test_no_other_row_changes(filling: str, gains: bool) -> None:
    alone, logprobs = golden([])
    assert alone[0] != alone[1], "the honest adapter must show"
    hostile = admitted(filling, gains=gains)
    assert len(hostile) > 15, "a test of few adapters would say little"
    tokens, beside = golden(hostile.items())
    assert tokens == alone
    for mine, theirs in zip(logprobs, beside, strict=True):
        assert mine == pytest.approx(theirs, abs=1e-4)


def test_beyond_the_largest_value_nothing_is_let_in() -> None:
    for value in (65536.0, 1e38, 3.4e38, math.inf, -math.inf, math.nan):
        for peft_type, method in METHOD_OF.items():
            tensors: dict[str, Any] = load(honest(method).weights)
            name = next((n for n, t in tensors.items() if t.is_floating_point() and t.numel()), None)
            assert name is not None, peft_type
            tensors[name].view(-1)[-1] = value
            with pytest.raises(AdapterInvalid, match="beyond 65504"):
                admit(CheckpointFiles(config=honest(method).config, weights=save(tensors)))
