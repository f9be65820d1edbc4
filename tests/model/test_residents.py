"""Memory that runs out while an adapter is put on the device, and in a pass: one more try, and nobody else notices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from peft_serve.adapters.primitives import Adapter
from peft_serve.core import AdapterId, Install
from peft_serve.errors import Unavailable
from peft_serve.model.base import ResidentBase
from peft_serve.model.heads import Heads
from peft_serve.model.passes import Passes
from peft_serve.model.pools import KVPool
from peft_serve.model.prefixes import VirtualTokens
from peft_serve.model.residents import Residents
from tests.model.driver import Driver, Job
from tests.model.test_arena import COLD, WARM, adapter
from tests.model.tiny_models import tiny

ERRORS = [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()]


def last_term(base: ResidentBase) -> Any:
    """The last one that an adapter's edits are put into."""
    return base.adapted.at[list(adapter(base, COLD, 1).sites)[-1]].terms[-1]


class Short:
    """Runs out so many times, at some act; what is given back is counted."""

    def __init__(self, act: Callable[..., object], times: int, error: Exception) -> None:
        self._act = act
        self._left = times
        self._error = error
        self.num_asked = self.num_freed = 0

    def __call__(self, *given: object, **named: object) -> object:
        self.num_asked += 1
        if self._left:
            self._left -= 1
            raise self._error
        return self._act(*given, **named)

    def free(self) -> None:
        self.num_freed += 1


def residents(base: ResidentBase, known: dict[AdapterId, Adapter], free: Callable[[], None]) -> Residents:
    pool = KVPool(base.runs.cache, num_blocks=4, block_size=4, dtype=base.dtype, device=base.device)
    virtual = VirtualTokens(base, Passes(base, pool=pool, cross_pool=None), pool)
    return Residents(base, known.__getitem__, virtual, Heads(base), free=free)


@pytest.mark.parametrize("error", ERRORS)
def test_an_install_without_memory_is_tried_once_more(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    base = ResidentBase(tiny("llama"), name="llama")
    known = {COLD: adapter(base, COLD, 1)}
    last = last_term(base)
    short = Short(last.put, 1, error)
    monkeypatch.setattr(last, "put", short)
    ours = residents(base, known, short.free)
    assert ours.install(Install(slot=1, adapter=COLD)) is None
    assert (short.num_asked, short.num_freed, ours.was_short_of_memory) == (2, 1, True)
    ours.remove(1)
    assert not base.adapted._installed


@pytest.mark.parametrize("error", ERRORS)
def test_one_that_does_not_fit_is_refused_and_leaves_nothing(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    base = ResidentBase(tiny("llama"), name="llama")
    known = {COLD: adapter(base, COLD, 1), WARM: adapter(base, WARM, 2)}
    last = last_term(base)
    short = Short(last.put, 2, error)
    ours = residents(base, known, short.free)
    with monkeypatch.context() as patched:
        patched.setattr(last, "put", short)
        assert ours.install(Install(slot=1, adapter=COLD)) == "memory ran out; try again later"
    assert (short.num_asked, short.num_freed) == (2, 1), "tried twice, and not for ever"
    assert not base.adapted._installed
    assert ours.install(Install(slot=1, adapter=WARM)) is None, "the slot is empty"


def test_what_is_wrong_with_an_adapter_is_no_shortage(monkeypatch: pytest.MonkeyPatch) -> None:
    base = ResidentBase(tiny("llama"), name="llama")
    last = last_term(base)
    short = Short(last.put, 1, ValueError("of another base"))
    monkeypatch.setattr(last, "put", short)
    ours = residents(base, {COLD: adapter(base, COLD, 1)}, short.free)
    assert ours.install(Install(slot=1, adapter=COLD)) == "of another base"
    assert (short.num_asked, short.num_freed, ours.was_short_of_memory) == (1, 0, False)


@pytest.mark.parametrize("num_times", [1, 40])
def test_rows_beside_one_that_does_not_fit_get_their_tokens(num_times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory runs out in passes over a long prompt: the first time, or whenever it is there."""
    base = ResidentBase(tiny("llama"), name="llama")
    driver = Driver(base, {COLD: adapter(base, COLD, 1), WARM: adapter(base, WARM, 2)}, seed=1)
    driver.install(COLD, WARM)
    jobs = [Job(prompt=(5, 6, 7), num_new=1, adapter=name) for name in (COLD, WARM)]
    long = Job(prompt=tuple(range(1, 30)), num_new=1, adapter=WARM)
    copies: list[tuple[int, int]] = []
    rows = tuple(driver._row(job, 40, copies, str(i)) for i, job in enumerate((*jobs, long)))
    expected = [row.token for row in driver.run(rows=rows).rows]
    hidden, left = base.runs.logits, [num_times]

    def short(tokens: torch.Tensor, *more: torch.Tensor) -> torch.Tensor:
        if tokens.numel() > 20 and left[0]:
            left[0] -= 1
            raise torch.OutOfMemoryError("CUDA out of memory")
        return hidden(tokens, *more)

    monkeypatch.setattr(base.runs, "logits", short)
    done = driver.run(rows=rows)
    assert done.was_short_of_memory
    if num_times == 1:
        assert [row.token for row in done.rows] == expected
        assert not any(row.failure for row in done.rows), "the second try had the memory"
        left[0] = 1
        (alone,) = driver.run(rows=rows[2:]).rows
        assert (alone.token, alone.failure) == (expected[2], None), "a row by itself has one too"
    else:
        assert [row.token for row in done.rows] == [*expected[:2], None]
        assert isinstance(done.rows[2].failure, Unavailable)
        assert done.rows[2].failure.retry_after_s
    after = driver.run(rows=tuple(replace(row) for row in rows[:2]))
    assert [row.token for row in after.rows] == expected[:2]
