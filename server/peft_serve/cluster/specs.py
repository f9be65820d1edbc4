"""Grammars across processes: their source travels, and the vocabulary once by reference; replicas compile them again.

A compiled grammar is the library's and does not leave its process. The vocabulary of a base is megabytes: the front
puts it where replicas can get it (`put`), and a request brings the reference, which a replica follows the first time.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from peft_serve.cluster.wire import Spec
from peft_serve.core import Constraint
from peft_serve.errors import Internal, InvalidParameter
from peft_serve.grammars.compiler import MAX_COMPILED, MAX_VOCABULARIES, compiled_source, words_of
from peft_serve.grammars.grammar import GrammarRefused
from peft_serve.grammars.matching import CompiledGrammar, GrammarConstraint

if TYPE_CHECKING:
    from llguidance import LLTokenizer

Tokens = tuple[bytes, ...]


class SpecWriter:
    """The front's side. `put(tokens)` gives a reference that pickles and can be awaited. Used by one thread."""

    def __init__(self, put: Callable[[Tokens], Any]) -> None:
        self._put = put
        self._known: OrderedDict[int, tuple[Tokens, str, Any]] = OrderedDict()  # by identity: hashing takes long

    def spec_of(self, constraint: Constraint | None) -> Spec | None:
        """What a replica makes the constraint of."""
        if constraint is None:
            return None
        assert isinstance(constraint, GrammarConstraint), "there is one kind of constraint"
        compiled = constraint.compiled
        _, digest, words = self._vocabulary(compiled.tokens)
        return Spec(source=compiled.source, vocabulary=digest, words=words, eos_ids=constraint.eos_ids)

    def _vocabulary(self, tokens: Tokens) -> tuple[Tokens, str, Any]:
        known = self._known.get(id(tokens))
        if known is None:
            digest = sha256(b"".join(b"%d:%s" % (len(token), token) for token in tokens)).hexdigest()
            known = self._known[id(tokens)] = (tokens, digest, self._put(tokens))
            if len(self._known) > MAX_VOCABULARIES:
                self._known.popitem(last=False)
        self._known.move_to_end(id(tokens))
        return known


class SpecReader:
    """The replica's side: owns one thread and what was compiled last. Used on one event loop."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="grammars")
        self._words: OrderedDict[str, asyncio.Task[tuple[Tokens, LLTokenizer]]] = OrderedDict()
        self._compiled: OrderedDict[tuple[str, str], Future[CompiledGrammar]] = OrderedDict()

    async def constraint_of(self, spec: Spec) -> Constraint:
        """The constraint; raises InvalidParameter, and Internal where the vocabulary cannot be had."""
        place = (spec.vocabulary, spec.source)
        future = self._compiled.get(place)
        if future is None:
            tokens, words = await self._vocabulary(spec)
            future = self._thread.submit(compiled_source, words, spec.source, tokens)
            self._compiled[place] = future
        _keep(self._compiled, place, MAX_COMPILED)
        try:
            return GrammarConstraint(await asyncio.shield(asyncio.wrap_future(future)), spec.eos_ids)
        except GrammarRefused as error:  # the front compiled the same
            raise InvalidParameter(f"the grammar cannot be compiled: {error}") from error

    async def _vocabulary(self, spec: Spec) -> tuple[Tokens, LLTokenizer]:
        task = self._words.get(spec.vocabulary)
        if task is None:
            task = self._words[spec.vocabulary] = asyncio.ensure_future(self._read(spec.words))
        _keep(self._words, spec.vocabulary, MAX_VOCABULARIES)
        try:
            return await asyncio.shield(task)
        except Exception as error:
            self._words.pop(spec.vocabulary, None)
            raise Internal("the vocabulary that the grammar is for cannot be had; send the request again") from error

    async def _read(self, words: Any) -> tuple[Tokens, LLTokenizer]:
        tokens: Tokens = await words
        made = await asyncio.wrap_future(self._thread.submit(words_of, tokens))
        return tokens, made


def _keep(kept: OrderedDict[Any, Any], place: Any, most: int) -> None:
    kept.move_to_end(place)
    while len(kept) > most:
        kept.popitem(last=False)
