"""Two answers to one prompt, and how they compare."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

READ_TOLERANCE: Final = 1e-4
"""Of what is read in float32, relative to its largest value: the rounding of many layers, and nothing more."""

_MOVED: Final = 1e-6


class Compared(Protocol):
    """One prompt through peft and through the server."""

    @property
    def text(self) -> str: ...

    @property
    def is_equal(self) -> bool: ...

    @property
    def gap(self) -> float:
        """The largest difference of what both gave."""
        ...

    @property
    def moves(self) -> bool | None:
        """Whether the adapter changes anything on this prompt; None where the base alone gives nothing."""
        ...

    @property
    def told(self) -> str:
        """What was compared, in words, and both answers where they differ."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """Greedy tokens and the log-probability of each."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One prompt answered with text by peft, by the server, and by the server's base alone."""

    text: str
    expected: Answer
    served: Answer
    base: Answer

    @property
    def is_equal(self) -> bool:
        return self.expected.tokens == self.served.tokens

    @property
    def moves(self) -> bool | None:
        return self.served.tokens != self.base.tokens or self._gap(self.served, self.base) > _MOVED

    @property
    def gap(self) -> float:
        """Of log-probabilities, over the tokens that both gave."""
        return self._gap(self.expected, self.served)

    @property
    def told(self) -> str:
        count = f"{len(self.served.tokens)} tokens"
        return count if self.is_equal else f"{list(self.expected.tokens)} / {list(self.served.tokens)}"

    @staticmethod
    def _gap(first: Answer, second: Answer) -> float:
        pairs = zip(first.tokens, second.tokens, first.logprobs, second.logprobs, strict=False)
        worst = 0.0
        for one, other, a, b in pairs:
            if one != other:
                break
            worst = max(worst, abs(a - b))
        return worst


Rows = tuple[tuple[float, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadComparison:
    """One text read by peft, by the server, and by the server's base alone: logits or hidden states, row by row."""

    text: str
    expected: Rows
    served: Rows
    base: Rows | None = None  # None: the base has no head of its own to read by

    @property
    def is_equal(self) -> bool:
        if _shape(self.expected) != _shape(self.served):
            return False
        largest = max((abs(value) for row in self.expected for value in row), default=0.0)
        return self.gap <= READ_TOLERANCE * max(1.0, largest)

    @property
    def moves(self) -> bool | None:
        if self.base is None or _shape(self.base) != _shape(self.served):
            return None
        return _distance(self.served, self.base) > _MOVED

    @property
    def gap(self) -> float:
        return _distance(self.expected, self.served)

    @property
    def told(self) -> str:
        if _shape(self.expected) != _shape(self.served):
            return f"{_words(self.expected)} / {_words(self.served)}"
        return _words(self.served)


def _shape(rows: Rows) -> tuple[int, ...]:
    return tuple(len(row) for row in rows)


def _words(rows: Rows) -> str:
    return f"{len(rows)} x {len(rows[0]) if rows else 0} values"


def _distance(first: Rows, second: Rows) -> float:
    pairs = ((a, b) for one, other in zip(first, second, strict=False) for a, b in zip(one, other, strict=False))
    return max((abs(a - b) for a, b in pairs), default=0.0)


def verdict(comparisons: Sequence[Compared]) -> tuple[bool, str]:
    """Whether the adapter is served as peft runs it, and that in one sentence."""
    different = [c for c in comparisons if not c.is_equal]
    worst = max(c.gap for c in comparisons)
    if different:
        return False, f"{len(different)} of {len(comparisons)} answers differ from peft's"
    kind = "log-probabilities" if isinstance(comparisons[0], Comparison) else "values"
    sentence = f"all {len(comparisons)} answers equal peft's, {kind} within {worst:.1e}"
    if all(c.moves is False for c in comparisons):
        return True, sentence + "; the adapter changes nothing on these prompts (is it trained?)"
    return True, sentence
