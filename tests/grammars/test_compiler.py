"""The compiler: what it keeps, how long it takes, whom it keeps waiting."""

from __future__ import annotations

import asyncio
import threading

import pytest

from peft_serve.errors import QueueFull
from peft_serve.grammars import compiler as module
from peft_serve.grammars.compiler import MAX_WAITING, GrammarCompiler
from peft_serve.grammars.grammar import GrammarRefused, of_regex
from peft_serve.grammars.spelling import Spelling
from tests.grammars.vocabularies import byte_level, spelled

SPELLING = spelled(byte_level())


async def test_a_grammar_is_compiled_once_for_each_vocabulary() -> None:
    compiler, asked = GrammarCompiler(), []

    def telling() -> Spelling:
        asked.append(1)
        return SPELLING

    first, again = await asyncio.gather(*(compiler.compiled("one", telling, of_regex("a+")) for _ in range(2)))
    assert first is again
    assert await compiler.compiled("two", telling, of_regex("a+")) is not first
    assert len(asked) == 2


async def test_the_one_that_was_asked_for_longest_ago_is_forgotten() -> None:
    compiler = GrammarCompiler(max_compiled=2)
    first = await compiler.compiled("one", lambda: SPELLING, of_regex("a"))
    await compiler.compiled("one", lambda: SPELLING, of_regex("b"))
    assert await compiler.compiled("one", lambda: SPELLING, of_regex("a")) is first
    await compiler.compiled("one", lambda: SPELLING, of_regex("c"))
    assert await compiler.compiled("one", lambda: SPELLING, of_regex("a")) is first
    assert len(compiler._compiled) == 2


async def test_waiting_is_bounded_in_time_and_in_number() -> None:
    gate = threading.Event()

    def slow() -> Spelling:
        gate.wait(20)
        return SPELLING

    compiler = GrammarCompiler(time_limit_s=0.05)
    try:
        with pytest.raises(GrammarRefused, match=r"more than 0\.05 s"):
            await compiler.compiled("slow", slow, of_regex("a"))
        with pytest.raises(QueueFull, match="take long"):
            await compiler.compiled("other", lambda: SPELLING, of_regex("b"))
        waiting = [
            asyncio.ensure_future(compiler.compiled("other", lambda: SPELLING, of_regex(f"c{{{i + 1}}}")))
            for i in range(MAX_WAITING + 3)
        ]
        ended = await asyncio.gather(*waiting, return_exceptions=True)
        assert sum("wait to be compiled" in str(error) for error in ended) >= 3
    finally:
        gate.set()
    compiler._time_limit_s = 20
    assert await compiler.compiled("slow", slow, of_regex("a")) is not None
    assert module.MAX_COMPILED >= 1


async def test_a_refusal_is_not_kept() -> None:
    compiler = GrammarCompiler()
    for _ in range(2):
        with pytest.raises(GrammarRefused, match="unclosed"):
            await compiler.compiled("one", lambda: SPELLING, of_regex("(a"))
    assert not compiler._compiled
