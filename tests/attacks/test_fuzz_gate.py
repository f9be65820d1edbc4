"""The fuzzer's target without the fuzzer: honest inputs pass, some hundred spoilt ones raise nothing."""

from __future__ import annotations

import random

import pytest

from tests.attacks import fuzz_gate
from tests.attacks.fuzz_gate import PEFT_TYPES, TARGETS, one_input, seeds

NUM_SPOILT = 600


def test_every_honest_input_is_let_in() -> None:
    found = seeds()
    assert len(found) > 3 * len(PEFT_TYPES)
    assert {content[0] for content in found.values()} == set(range(len(TARGETS)))
    for content in found.values():
        if content[0] != 5:  # names of adapters that are nowhere
            TARGETS[content[0]](PEFT_TYPES[content[1]], content[2:])


def test_spoilt_inputs_are_refused_and_nothing_else() -> None:
    rng = random.Random(11)
    everything = list(seeds().values())
    for _ in range(NUM_SPOILT):
        content = bytearray(rng.choice(everything))
        for _ in range(rng.randint(1, 6)):
            at = rng.randrange(len(content))
            chosen = rng.randrange(4)
            if chosen == 0:
                content[at] = rng.randrange(256)
            elif chosen == 1:
                del content[at : at + rng.randrange(1, 9)]
            elif chosen == 2:
                content[at:at] = rng.choice(everything)[:40]
            else:
                content[at : at + 1] = rng.choice((b"0", b"-", b"9" * 30, b"[", b'"', b"\xff", b"null"))
            if not content:
                break
        one_input(bytes(content))


def test_another_exception_comes_through(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz_gate, "read_upload", lambda *_, **__: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        one_input(b"\x03\0PK")
