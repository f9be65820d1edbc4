"""Every decoder-only family gives its last hidden states beside its logits, in chunks and in mixed steps."""

from __future__ import annotations

import pytest
import torch

from peft_serve.core import Reading
from peft_serve.model.loader import wrap
from tests.model.reading_driver import ReadingDriver, Wish
from tests.model.tiny_models import CAUSAL, tiny
from tests.model.tiny_more import MORE_CAUSAL, tiny_more

PROMPTS = ((5, 9, 30, 12, 41), (17, 8, 22, 60, 33, 10, 11, 12, 13, 14, 15, 40), (63,))
FAMILIES = [*CAUSAL, *MORE_CAUSAL]


@pytest.mark.parametrize("name", FAMILIES)
def test_last_states_are_the_bodys_own(name: str) -> None:
    model = tiny(name) if name in CAUSAL else tiny_more(name)
    with torch.no_grad():
        own = [model.base_model(torch.tensor([prompt]), use_cache=False).last_hidden_state[0] for prompt in PROMPTS]
    driver = ReadingDriver(wrap(model, name=name), max_step_tokens=7)
    wishes = [Wish(reading, prompt) for prompt in PROMPTS for reading in (Reading.LAST, Reading.MEAN)]
    rows = driver.read(wishes)
    expected = [state for states in own for state in (states[-1], states.mean(dim=0))]
    for got, wanted in zip(rows, expected, strict=True):
        torch.testing.assert_close(torch.tensor(got[0]), wanted, rtol=1e-4, atol=1e-5)
