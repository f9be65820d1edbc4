"""What a captured step needs of kernels: tables that stay where they are, and a word for what cannot be captured.

A step captured in a CUDA graph launches the same programs over the same memory at every replay. Whatever differs from
step to step is in tables on the device that are filled before.
"""

from __future__ import annotations

from typing import Protocol

from peft_serve.kernels.low_rank import Segments


class NotCapturable(Exception):  # noqa: N818  named as what is the matter
    """Something in the step depends on which adapters and tokens it has; the message says what."""


class HeldSegments(Protocol):
    """The tokens of whatever step was told last."""

    @property
    def segments(self) -> Segments:
        """For ops of kernels that are captured: they read the step that is told last, and these say nothing of it."""
        ...

    def fill(self, segments: Segments) -> None:
        """From now on, in the order of the current stream, the step is this one; what was changed of adapters by now
        holds too."""
        ...


class HeldTables(Protocol):
    """Where adapters in slots lie, for kernels that are captured. One thread at a time."""

    @property
    def num_moves(self) -> int:
        """How often the tables went elsewhere: what was captured at another count reads what is gone."""
        ...

    def fits(self, segments: Segments) -> bool:
        """Whether there is room for the adapters of a step in what is captured; tables by slot are made to reach
        their slots, and may move for it."""
        ...

    def held(self, num_tokens: int) -> HeldSegments:
        """Memory for steps of up to so many tokens."""
        ...
