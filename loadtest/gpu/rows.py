"""Steps of a resident base without a scheduler: rows that decode one token behind a context, again and again.

What a row attends to is the pool as it was made, all zeros: it costs what any context costs. On an encoder-decoder each
row's source is encoded in a step of its own before.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Final

from loadtest.installing import holding
from loadtest.work import Load
from peft_serve.adapters.primitives import Adapter
from peft_serve.core import (
    BASE_SLOT,
    AdapterId,
    Draw,
    Reading,
    RequestId,
    Row,
    SamplingParams,
    Step,
    StepResult,
)
from peft_serve.model.base import ResidentBase
from peft_serve.model.runner import StepRunner
from peft_serve.model.step_graphs import Capturing

BLOCK_SIZE: Final = 16
_GREEDY: Final = Draw(params=SamplingParams(), seed=0, index=0)


class Steps:
    """A runner with room for the rows of `loads`, and adapters in its slots."""

    def __init__(
        self,
        base: ResidentBase,
        loads: Sequence[Load],
        *,
        num_source: int = 0,
        capturing: Capturing | None = None,
    ) -> None:
        """`num_source` is the length of every row's source, on an encoder-decoder; `capturing` says how decode steps
        are captured, if they are."""
        self.base = base
        self.num_source = num_source
        self._adapters: dict[AdapterId, Adapter] = {}
        blocks = max((load.num_rows * _blocks(load.context + load.num_tokens) for load in loads), default=1)
        cross = max((load.num_rows * _blocks(num_source) for load in loads), default=1) if num_source else 0
        self._runner = StepRunner(
            base,
            num_blocks=1 + blocks,
            num_cross_blocks=1 + cross if cross else 0,
            block_size=BLOCK_SIZE,
            adapters=self._adapters.__getitem__,
            capturing=capturing,
        )

    def holding(self, adapters: Mapping[int, Adapter]) -> AbstractContextManager[None]:
        """Adapters by slot, installed inside the block. RuntimeError where one cannot be."""
        return holding(self._runner, self._adapters, adapters)

    def run(self, rows: Sequence[Row]) -> StepResult:
        """One step. RuntimeError with the reason where a row failed."""
        done = self._runner.run(Step(id=3, rows=tuple(rows)))
        failed = next((one.failure for one in done.rows if one.failure is not None), None)
        if failed is not None:
            raise RuntimeError(f"a row failed: {failed}")
        return done

    def decoding(self, load: Load, slots: Sequence[int] | None = None) -> tuple[Row, ...]:
        """Rows for a step of this load, one for each slot, the base's if none are given."""
        own = sorted(slots) if slots is not None else [BASE_SLOT] * load.num_rows
        assert len(own) == load.num_rows, "a slot for each row"
        return tuple(self._row(number, slot, load) for number, slot in enumerate(own))

    def encode(self, rows: Sequence[Row]) -> None:
        """Compute the sources of rows, once before they decode."""
        source = tuple(5 + i % 50 for i in range(self.num_source))
        self.run([replace(row, source=source, tokens=(0,), start=0) for row in rows])

    def reading(self, load: Load, slots: Sequence[int] | None = None) -> tuple[Row, ...]:
        """Rows of an encoder, each read whole."""
        own = sorted(slots) if slots is not None else [BASE_SLOT] * load.num_rows
        source = tuple(5 + i % 50 for i in range(load.num_tokens))
        return tuple(
            Row(
                request=RequestId(str(number)),
                slot=slot,
                tokens=(),
                start=0,
                blocks=(),
                source=source,
                num_source=len(source),
                reading=Reading.MEAN,
            )
            for number, slot in enumerate(own)
        )

    def _row(self, number: int, slot: int, load: Load) -> Row:
        each, cross = _blocks(load.context + load.num_tokens), _blocks(self.num_source)
        return Row(
            request=RequestId(str(number)),
            slot=slot,
            tokens=tuple(5 + (7 * number + place) % 50 for place in range(load.num_tokens)),
            start=load.context,
            blocks=tuple(range(1 + number * each, 1 + (number + 1) * each)),
            draw=_GREEDY,
            cross_blocks=tuple(range(1 + number * cross, 1 + (number + 1) * cross)),
            num_source=self.num_source,
        )


def _blocks(num_positions: int) -> int:
    return -(-num_positions // BLOCK_SIZE)
