"""The check sees what may go wrong where tokens are told while the next step is computed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from loadtest.gpu.ground import Ground
from loadtest.gpu.telling_checks import telling
from peft_serve.core import Event
from peft_serve.engine.outbox import Outbox
from peft_serve.model import bringing

TOKENS, ORDER, WITHIN = (
    "tokens that are told",
    "each answer's tokens in their order, its end behind them",
    "steps tell while the next one is computed",
)


def failed() -> set[str]:
    found = telling(Ground(device=torch.device("cpu"), is_quick=True))
    assert {check.name for check in found.checks} == {TOKENS, ORDER, WITHIN}
    return {check.name for check in found.checks if not check.passed}


def test_nothing_is_wrong_where_nothing_is() -> None:
    assert failed() == set()


def test_tokens_that_are_read_before_they_have_come_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a GPU's host does that does not wait: it finds what lay there before."""
    honest, before = bringing._brought, dict[int, list[float]]()

    def too_early(given_N: Tensor, meanwhile: Callable[[], None]) -> list[float]:
        numbers = honest(given_N, meanwhile)
        stale = before.get(len(numbers), [5.0] * len(numbers))
        before[len(numbers)] = numbers
        return numbers if meanwhile.__name__ != "within" else stale

    monkeypatch.setattr(bringing, "_brought", too_early)
    assert TOKENS in failed()


def test_a_step_that_is_told_twice_or_not_at_all_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = Outbox.tell_within_a_step

    def twice(box: Outbox) -> None:
        held = box._held
        honest(box)
        box._held = held

    monkeypatch.setattr(Outbox, "tell_within_a_step", twice)
    assert TOKENS in failed()
    monkeypatch.setattr(Outbox, "tell_within_a_step", lambda box: setattr(box, "_held", ()))
    assert {TOKENS, WITHIN} <= failed()


def test_what_is_told_out_of_order_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def backwards(box: Outbox, events: tuple[Event, ...] = ()) -> None:
        told, box._held = (*events, *box._held[::-1]), ()
        if told:
            box._deliver(told)

    monkeypatch.setattr(Outbox, "tell", backwards)
    assert ORDER in failed()
