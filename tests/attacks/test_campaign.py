"""A sample of the campaign, over every served type; `python -m tests.attacks.campaign` is the whole of it."""

from __future__ import annotations

import dataclasses
import json

import pytest

from peft_serve.adapters import gate
from peft_serve.adapters.methods import METHODS
from tests.attacks.campaign import Report, attack
from tests.attacks.golden_row import fingerprint, golden_row
from tests.attacks.hostile import with_config
from tests.attacks.subjects import METHOD_OF, UNCONTRADICTED
from tests.attacks.trials import Outcome, Subject

NUM_CONFIGS = 8
SHARE = 0.005


def test_every_served_type_is_attacked() -> None:
    assert METHOD_OF.keys() == METHODS.keys()
    for peft_type, fields in UNCONTRADICTED.items():
        schema = METHODS[peft_type].schema
        assert fields <= schema.required.keys() | schema.optional.keys()


@pytest.mark.parametrize("peft_type", sorted(METHOD_OF))
def test_sample(peft_type: str) -> None:
    report = Report(seed=7)
    attack(peft_type, report, share=SHARE, num_configs=NUM_CONFIGS)
    assert report.is_clean, (report.faults, report.slowest, report.slowest_ms)
    assert report.unchanged == 1
    assert report.outcomes["refused"] > 0


def test_judge_tells_what_must_not_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another plan, an exception of another kind and a refusal without a reason are all seen."""
    subject = Subject("LORA")
    assert subject.judge(subject.files).outcome is Outcome.SAME
    assert subject.judge(with_config(subject.files, lora_alpha=9)).outcome is Outcome.OTHER
    assert subject.judge(with_config(subject.files, r=5)).outcome is Outcome.REFUSED
    other = with_config(subject.files, bias="lora_only", use_rslora=True)
    assert subject.judge(other).outcome is Outcome.OTHER
    adapter = dataclasses.replace(subject.adapter, start=(1,))
    monkeypatch.setattr(subject, "adapter", adapter)
    assert subject.judge(subject.files).outcome is Outcome.ANOTHER_PLAN
    monkeypatch.setattr(gate, "parse_vocabulary", lambda *_: 1 // 0)
    assert subject.judge(subject.files).outcome is Outcome.CRASHED


def test_golden_row_sees_a_changed_base() -> None:
    subject = Subject("LORA")
    bits, row = fingerprint(subject.base), golden_row(subject)
    assert json.loads(json.dumps(row)) == list(row)
    weight = subject.base.model.lm_head.weight.data
    weight.neg_()  # which is exact, and so is taking it back
    try:
        assert fingerprint(subject.base) != bits
        assert golden_row(subject) != row
    finally:
        weight.neg_()
    assert fingerprint(subject.base) == bits
    assert golden_row(subject) == row
