"""Which states a reading looks at."""

from __future__ import annotations

import torch

from peft_serve.adapters.primitives import Head, HeadTask
from peft_serve.core import Reading
from peft_serve.model.base import ResidentBase
from peft_serve.model.heads import Heads
from peft_serve.model.readings import Ask, read
from tests.model.tiny_encoders import HIDDEN, tiny_encoder

STATES = torch.randn(6, HIDDEN, generator=torch.Generator().manual_seed(2))


def heads(family: str = "roberta", task: str = "FEATURE_EXTRACTION") -> Heads:
    return Heads(ResidentBase(tiny_encoder(family, task, num_labels=3), name=family))


def ask(reading: Reading, *, num_virtual: int = 0, slot: int = 0) -> Ask:
    return Ask(slot=slot, reading=reading, states_SD=STATES, num_virtual=num_virtual)


def test_hidden_states_need_no_head() -> None:
    first, last, mean = read(heads(), [ask(r, num_virtual=2) for r in (Reading.FIRST, Reading.LAST, Reading.MEAN)])
    torch.testing.assert_close(torch.tensor(first), STATES[:1])
    torch.testing.assert_close(torch.tensor(last), STATES[-1:])
    torch.testing.assert_close(torch.tensor(mean), STATES[2:].mean(dim=0, keepdim=True))


def test_a_reading_of_tokens_leaves_virtual_ones_out() -> None:
    model = tiny_encoder("roberta", "TOKEN_CLS", num_labels=3)
    (rows,) = read(heads(task="TOKEN_CLS"), [ask(Reading.TOKENS, num_virtual=2)])
    with torch.no_grad():
        torch.testing.assert_close(torch.tensor(rows), model.classifier(STATES[2:]))


def test_an_encoders_sequence_is_read_at_its_first_position_a_virtual_one_too() -> None:
    model = tiny_encoder("roberta", "SEQ_CLS", num_labels=3)
    (rows,) = read(heads(task="SEQ_CLS"), [ask(Reading.SEQUENCE, num_virtual=2)])
    with torch.no_grad():
        torch.testing.assert_close(torch.tensor(rows), model.classifier(STATES[None]))


def test_rows_without_a_head_are_empty_and_the_others_are_not() -> None:
    own = heads()
    weight = torch.ones(2, HIDDEN)
    own.put(3, Head(HeadTask.SPANS, {"qa_outputs.weight": weight, "qa_outputs.bias": torch.zeros(2)}))
    asks = [ask(Reading.SEQUENCE), ask(Reading.TOKENS, slot=3), ask(Reading.SPANS, slot=3), ask(Reading.MEAN, slot=4)]
    nothing, wrong_task, spans, mean = read(own, asks)
    assert nothing == wrong_task == ()
    torch.testing.assert_close(torch.tensor(spans), STATES @ weight.T)
    assert len(mean) == 1
