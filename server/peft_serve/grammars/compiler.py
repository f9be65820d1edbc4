"""Compiles grammars beside the event loop, and keeps those that were asked for last.

Owns one thread, the vocabularies as the library sees them, and a bounded number of compiled grammars. Compiling is
bounded by the library's own limits; a caller waits for it no longer than the time limit. Knows no request.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

from peft_serve.errors import QueueFull
from peft_serve.grammars.grammar import Grammar, GrammarRefused
from peft_serve.grammars.matching import CompiledGrammar
from peft_serve.grammars.spelling import Spelling, Unspellable

MAX_COMPILED: Final = 64
MAX_VOCABULARIES: Final = 8
"""Compiled grammars, and vocabularies, that are kept: some megabytes each at most."""

MAX_WAITING: Final = 32
_RETRY_AFTER_S: Final = 2.0


class _Words:
    """A vocabulary as llguidance wants it. It is asked to spell nothing: grammars allow every way of spelling."""

    bos_token_id = None
    special_token_ids: tuple[int, ...] = ()

    def __init__(self, tokens: tuple[bytes, ...]) -> None:
        self.tokens = [*tokens, b""]
        self.eos_token_id = len(tokens)

    def __call__(self, _text: object) -> list[int]:
        return []


class GrammarCompiler:
    """See the module's docstring. Used on the event loop's thread."""

    def __init__(self, *, time_limit_s: float = 5.0, max_compiled: int = MAX_COMPILED) -> None:
        self._time_limit_s = time_limit_s
        self._max_compiled = max_compiled
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="grammars")
        self._compiled: OrderedDict[tuple[Hashable, Grammar], Future[CompiledGrammar]] = OrderedDict()
        self._vocabularies: OrderedDict[Hashable, tuple[LLTokenizer, Spelling] | Unspellable] = OrderedDict()

    async def compiled(self, key: Hashable, spelled: Callable[[], Spelling], grammar: Grammar) -> CompiledGrammar:
        """The grammar over the vocabulary that `key` stands for; `spelled` tells it, once.

        Raises GrammarRefused, also for a vocabulary that cannot be spelled, and QueueFull.
        """
        place = (key, grammar)
        future = self._compiled.get(place)
        if future is None:
            if sum(not each.done() for each in self._compiled.values()) >= MAX_WAITING:
                raise QueueFull(
                    f"{MAX_WAITING} grammars wait to be compiled; try again in a moment", retry_after_s=_RETRY_AFTER_S
                )
            future = self._compiled[place] = self._thread.submit(self._compile, key, spelled, grammar)
        self._compiled.move_to_end(place)
        self._forget_oldest()
        try:
            async with asyncio.timeout(self._time_limit_s):
                return await asyncio.shield(asyncio.wrap_future(future))
        except TimeoutError:
            if not future.running():
                raise QueueFull(
                    "other grammars take long to compile; try again in a moment", retry_after_s=_RETRY_AFTER_S
                ) from None
            raise GrammarRefused(f"it takes more than {self._time_limit_s:g} s to compile; make it simpler") from None
        except GrammarRefused:
            self._compiled.pop(place, None)  # a refusal is cheap, and need not keep a good one from its place
            raise

    def _forget_oldest(self) -> None:
        for place in [place for place, future in self._compiled.items() if future.done()]:
            if len(self._compiled) <= self._max_compiled:
                return
            del self._compiled[place]

    def _compile(self, key: Hashable, spelled: Callable[[], Spelling], grammar: Grammar) -> CompiledGrammar:
        """On the compiler's thread."""
        words, spelling = self._vocabulary(key, spelled)
        source = grammar.lark(may_begin_with_space=spelling.drops_first_space)
        return compiled_source(words, source, spelling.tokens)

    def _vocabulary(self, key: Hashable, spelled: Callable[[], Spelling]) -> tuple[LLTokenizer, Spelling]:
        found = self._vocabularies.get(key)
        if found is None:
            try:
                spelling = spelled()
                found = (words_of(spelling.tokens), spelling)
            except ValueError as error:
                found = error if isinstance(error, Unspellable) else Unspellable(str(error))
            self._vocabularies[key] = found
            if len(self._vocabularies) > MAX_VOCABULARIES:
                self._vocabularies.popitem(last=False)
        if isinstance(found, Unspellable):
            raise GrammarRefused(f"the tokenizer here cannot be held to a grammar: {found}")
        return found


def words_of(tokens: tuple[bytes, ...]) -> LLTokenizer:
    """A vocabulary as the library keeps it; raises ValueError for one that it cannot."""
    end = len(tokens)
    return LLTokenizer(TokenizerWrapper(_Words(tokens)), n_vocab=end + 1, eos_token=end)


def compiled_source(words: LLTokenizer, source: str, tokens: tuple[bytes, ...]) -> CompiledGrammar:
    """A grammar in the library's own language over `words`, which are made of `tokens`; raises GrammarRefused. Slow."""
    matcher = LLMatcher(words, source, log_level=0, limits=_limits())
    compiled = CompiledGrammar(matcher, end=len(tokens), source=source, tokens=tokens)
    compiled.check()
    return compiled


def _limits() -> LLParserLimits:
    """A step takes some milliseconds at most, a grammar some tens of megabytes."""
    return LLParserLimits(
        max_items_in_row=1000,
        step_lexer_fuel=100_000,
        step_max_items=20_000,
        max_lexer_states=20_000,
        max_grammar_size=200_000,
        verbose_errors=False,
    )
