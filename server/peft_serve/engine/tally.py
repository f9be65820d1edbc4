"""What the steps of an engine came to, for people who watch: the last step's rows, and tokens since the start.

Written by the engine's thread, a few additions for each row of a step. Knows no clock and no model.
"""

from __future__ import annotations

from peft_serve.core import Row, Step


class StepTally:
    """Counts since the engine was made; `rows` are those of the step that was noted last."""

    def __init__(self) -> None:
        self.rows: tuple[Row, ...] = ()
        self.num_prompt_tokens = 0  # prompt tokens computed, encoder tokens included
        self.num_drawn_tokens = 0  # rows that drew a token

    def note(self, step: Step) -> None:
        """A step has run."""
        self.rows = step.rows
        for row in step.rows:
            if row.draw is not None:
                self.num_drawn_tokens += 1
            if is_prefill(row):
                self.num_prompt_tokens += len(row.tokens) + len(row.source)


def is_prefill(row: Row) -> bool:
    """Whether the row computes its request's prompt, rather than a token behind it or a choice."""
    return bool(row.source) or row.reading is not None or (not row.branch and row.start < row.prompt[1])
