"""What a profile asks for must be what the server gives, and virtual tokens are counted at upload."""

from __future__ import annotations

from dataclasses import replace

import pytest

from peft_serve.adapters.gate import inspect
from peft_serve.adapters.limits import GateLimits
from peft_serve.adapters.profile import parse_profile
from peft_serve.errors import AdapterInvalid
from tests.adapters.checkpoints import make_base, make_checkpoint
from tests.adapters.fake_base import FakeBase


@pytest.mark.parametrize(
    "parameters",
    ['{"temperature": 1e-9}', '{"repetition_penalty": 0.001}', '{"max_new_tokens": 200}', '{"temperature": true}'],
)
def test_parameters_that_every_request_would_fail_on_are_refused(parameters: str) -> None:
    with pytest.raises(AdapterInvalid, match="parameters"):
        parse_profile(f'{{"parameters": {parameters}}}'.encode(), max_new_tokens=100)


def test_parameters_within_the_ranges_are_taken() -> None:
    profile = parse_profile(b'{"parameters": {"temperature": 0, "max_new_tokens": 100}}', max_new_tokens=100)
    assert profile.parameters == {"temperature": 0, "max_new_tokens": 100}


@pytest.mark.parametrize(("method", "number"), [("prompt_tuning", 5), ("prefix_tuning", 3), ("lora", 0)])
def test_virtual_tokens_are_in_the_summary(method: str, number: int) -> None:
    base = make_base("gpt2")
    files, _ = make_checkpoint(method, "gpt2", base=base)
    limits = GateLimits(max_new_tokens=50)
    fake = FakeBase(make_base("gpt2"))
    assert inspect(files, fake, limits).summary.num_virtual_tokens == number
    greedy = replace(files, profile=b'{"parameters": {"max_new_tokens": 51}}')
    with pytest.raises(AdapterInvalid, match="at most 50"):
        inspect(greedy, fake, limits)
