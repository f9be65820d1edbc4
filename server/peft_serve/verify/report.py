"""Two answers to one prompt, and how they compare."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """Greedy tokens and the log-probability of each."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One prompt through peft, through the server, and through the server's base alone."""

    text: str
    expected: Answer
    served: Answer
    base: Answer

    @property
    def is_equal(self) -> bool:
        return self.expected.tokens == self.served.tokens

    @property
    def moves(self) -> bool:
        """Whether the adapter changes anything on this prompt."""
        return self.served.tokens != self.base.tokens or self._gap(self.served, self.base) > 1e-6

    @property
    def logprob_gap(self) -> float:
        """The largest difference of log-probabilities over the tokens that both gave."""
        return self._gap(self.expected, self.served)

    @staticmethod
    def _gap(first: Answer, second: Answer) -> float:
        pairs = zip(first.tokens, second.tokens, first.logprobs, second.logprobs, strict=False)
        worst = 0.0
        for one, other, a, b in pairs:
            if one != other:
                break
            worst = max(worst, abs(a - b))
        return worst


def verdict(comparisons: list[Comparison]) -> tuple[bool, str]:
    """Whether the adapter is served as peft runs it, and that in one sentence."""
    different = [c for c in comparisons if not c.is_equal]
    worst = max(c.logprob_gap for c in comparisons)
    if different:
        return False, f"{len(different)} of {len(comparisons)} answers differ from peft's"
    sentence = f"all {len(comparisons)} answers equal peft's, log-probabilities within {worst:.1e}"
    if not any(c.moves for c in comparisons):
        return True, sentence + "; the adapter changes nothing on these prompts (is it trained?)"
    return True, sentence
