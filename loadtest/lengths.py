"""Lengths: how many tokens a request brings and how many it asks for."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """Prompt and answer lengths, each uniform over a closed range of tokens."""

    prompt_min: int
    prompt_max: int
    answer_min: int
    answer_max: int

    def __post_init__(self) -> None:
        """Refuse empty and non-positive ranges."""
        if not (1 <= self.prompt_min <= self.prompt_max and 1 <= self.answer_min <= self.answer_max):
            raise ValueError(f"lengths must be ascending ranges of at least one token, got {self}")

    @property
    def mean_answer(self) -> float:
        """Expected tokens of one answer."""
        return (self.answer_min + self.answer_max) / 2

    def draw(self, count: int, rng: np.random.Generator) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """`count` prompt lengths and as many answer lengths."""
        prompts = rng.integers(self.prompt_min, self.prompt_max + 1, size=count, dtype=np.int64)
        answers = rng.integers(self.answer_min, self.answer_max + 1, size=count, dtype=np.int64)
        return prompts, answers


def full_scale(*, divisor: int = 1) -> Lengths:
    """Uniform [8, 512] in and out, divided by `divisor`: 1 on an accelerator, 8 on a CPU."""
    low, high = max(1, 8 // divisor), max(1, 512 // divisor)
    return Lengths(prompt_min=low, prompt_max=high, answer_min=low, answer_max=high)


def parse_lengths(text: str) -> Lengths:
    """``gpu`` ([8,512]), ``cpu`` ([1,64]) or ``PMIN-PMAX,AMIN-AMAX`` in tokens, for instance ``16-64,32-32``."""
    if text == "gpu":
        return full_scale()
    if text == "cpu":
        return full_scale(divisor=8)
    try:
        (prompt_min, prompt_max), (answer_min, answer_max) = (
            (int(end) for end in part.split("-")) for part in text.split(",")
        )
    except ValueError:
        raise ValueError(f"lengths {text!r}: write cpu, gpu or PMIN-PMAX,AMIN-AMAX") from None
    return Lengths(prompt_min=prompt_min, prompt_max=prompt_max, answer_min=answer_min, answer_max=answer_max)
