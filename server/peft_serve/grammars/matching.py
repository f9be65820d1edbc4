"""A compiled grammar, and an answer's way through it: llguidance behind `core.Constraint` and `core.Matcher`.

The library knows one end of a text, an id of its own behind the vocabulary. Which ids of the base end an answer is the
request's business: they are put into the mask here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from peft_serve.errors import Internal, InvalidParameter
from peft_serve.grammars.grammar import GrammarRefused, shortened

if TYPE_CHECKING:
    from llguidance import LLMatcher

_UNSPELLABLE: Final = "no token of this base can go on with what the grammar asks for; change the grammar"
_FORBIDDEN: Final = "satisfy the grammar"
"""In the library's words about a token that does not fit; whatever else it says is of a limit that was met."""


@dataclass(frozen=True, slots=True, eq=False)
class CompiledGrammar:
    """Compiled for one vocabulary; `end` is the id that stands for the end of the text.

    `source` and `tokens` are what it was compiled of: another process can do it again.
    """

    fresh: LLMatcher  # never moved: every answer gets a copy
    end: int
    source: str = ""
    tokens: tuple[bytes, ...] = ()

    def check(self) -> None:
        """Raise GrammarRefused for a grammar that is none, or that allows no text at all."""
        if self.fresh.is_error():
            raise GrammarRefused(shortened(self.fresh.get_error()))
        matcher = GrammarMatcher(self.fresh.deep_copy(), self.end, ())
        try:
            matcher.mask()
        except InvalidParameter as error:
            raise GrammarRefused(error.message) from error
        if matcher.is_over:
            raise GrammarRefused("it allows the empty text only")


@dataclass(frozen=True, slots=True, eq=False)
class GrammarConstraint:
    """A compiled grammar for answers that end with one of `eos_ids`."""

    compiled: CompiledGrammar
    eos_ids: frozenset[int]

    def start(self) -> GrammarMatcher:
        return GrammarMatcher(self.compiled.fresh.deep_copy(), self.compiled.end, sorted(self.eos_ids))


class GrammarMatcher:
    """One answer's place in its grammar; see `core.Matcher`. Bound by the library's limits on each step."""

    def __init__(self, matcher: LLMatcher, end: int, eos_ids: Iterable[int]) -> None:
        self._matcher = matcher
        self._end = end
        self._eos_ids = tuple(eos_ids)
        self._is_over = False

    @property
    def is_over(self) -> bool:
        """As the last mask had it."""
        return self._is_over

    def mask(self) -> bytes:
        """Raises InvalidParameter where the grammar is too complex, or no token can go on with it."""
        bits = bytearray(self._matcher.compute_bitmask())
        self._require_sound()
        place, bit = divmod(self._end, 8)
        may_end = bits[place] >> bit & 1
        bits[place] &= ~(1 << bit) & 0xFF
        self._is_over = not bits.strip(b"\0")
        if self._is_over and not may_end:
            raise InvalidParameter(_UNSPELLABLE)
        for eos in self._eos_ids if may_end else ():
            if eos < self._end:
                bits[eos >> 3] |= 1 << (eos & 7)
        return bytes(bits)

    def accept(self, token: int) -> None:
        """Raises InvalidParameter where the grammar is too complex, Internal for a token that was not allowed."""
        if not self._matcher.consume_token(token):
            self._require_sound()

    def _require_sound(self) -> None:
        if not self._matcher.is_error():
            return
        reason = self._matcher.get_error()
        if _FORBIDDEN in reason:
            raise Internal("a token was drawn that the answer's grammar does not allow")
        if reason.startswith("NoExtension"):
            raise InvalidParameter(_UNSPELLABLE)
        raise InvalidParameter(f"the grammar becomes too complex here ({shortened(reason)}); make it simpler")
