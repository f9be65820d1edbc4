"""Runs a planned step on the device.

Owns the KV pools and the order of work inside a step: removes, installs, copies, encode, decode, choice of
tokens. It plans nothing: every slot and block it touches is named by the `Step`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import isfinite, isnan

import torch
from torch import Tensor

from peft_serve.adapters.primitives import Adapter
from peft_serve.core import BASE_SLOT, AdapterId, Row, RowResult, Step, StepResult
from peft_serve.errors import Internal
from peft_serve.model.apart import Apart
from peft_serve.model.arena import Arena
from peft_serve.model.base import ResidentBase
from peft_serve.model.bringing import Bringing
from peft_serve.model.candidates import candidates, tops
from peft_serve.model.carrier import Carrier
from peft_serve.model.encoder_pass import EncoderPass
from peft_serve.model.families.family import ReadsStates
from peft_serve.model.heads import Heads
from peft_serve.model.passes import Passes
from peft_serve.model.pools import KVPool, KVShape
from peft_serve.model.prefixes import VirtualTokens
from peft_serve.model.readings import Ask, Rows, read
from peft_serve.model.residents import Residents
from peft_serve.model.sampler import Chosen, Sampler, score
from peft_serve.model.sending import taken
from peft_serve.model.step_graphs import Capturing, StepGraphs
from peft_serve.model.step_memory import Pools

AddTo = Callable[[list[RowResult]], None]
"""Adds to the results of rows what was asked for beside tokens, once it is there."""


@dataclass(frozen=True, slots=True)
class _Kept:
    """Which rows of the logits belong to a row of the step."""

    row: int
    first: int
    count: int

    @property
    def last(self) -> int:
        return self.first + self.count - 1


class StepRunner:
    """Runs steps on a resident base; one at a time, from one thread."""

    def __init__(
        self,
        base: ResidentBase,
        *,
        num_blocks: int,
        num_cross_blocks: int,
        block_size: int,
        adapters: Callable[[AdapterId], Adapter],
        carrier: Carrier | None = None,
        capturing: Capturing | None = None,
        works_apart: bool | None = None,
    ) -> None:
        """`num_blocks` and `num_cross_blocks` count the padding block; the latter is 0 without an encoder.

        `adapters` gives the compiled adapter of an `Install` and may raise. With a `carrier` adapters lie among the KV
        blocks, in its arena. `capturing` says how decode steps are captured, if they are; the pool then has one block
        more, which rows without a request write to. `works_apart`: the device computes while the host does something
        else; a GPU does.
        """
        cross = base.runs.cross_cache
        self._base = base
        arena = None if carrier is None else carrier.arena
        num_scratch = 0 if capturing is None else 1
        self._pool = _pool(base, base.runs.cache, num_blocks + num_scratch, block_size, arena)
        self._cross_pool = None if cross is None else _pool(base, cross, num_cross_blocks, block_size)
        self._passes = Passes(base, pool=self._pool, cross_pool=self._cross_pool)
        self._virtual = VirtualTokens(base, self._passes, self._pool)
        self._encoder = EncoderPass(base, self._virtual) if base.shape.is_encoder else None
        self._heads = Heads(base)
        self._sampler = Sampler(banned=base.banned_ids)
        self._residents = Residents(base, adapters, self._virtual, self._heads, carrier=carrier, free=self._free)
        self._apart = Apart(self._run_rows, free=self._free)
        pools = Pools(own=self._pool, cross=self._cross_pool, scratch=self._pool.number(num_blocks))
        settle = self._residents.settle
        self._graphs = None if capturing is None else StepGraphs(base, pools, capturing, settle=settle)
        self._works_apart = base.device.type == "cuda" if works_apart is None else works_apart
        self._meanwhile: Callable[[], None] = lambda: None

    @torch.inference_mode()
    def run(self, step: Step) -> StepResult:
        """Run one step. What fails for some of its rows alone fails for them alone (`RowResult.failure`), and an
        adapter that cannot be installed fails with its rows, which are not run. Raises when the base does not run."""
        self._residents.was_short_of_memory = False
        for slot in step.removes:
            self._residents.remove(slot)
        if step.removes and self._graphs is not None:
            self._graphs.let_go()
        failed: dict[int, tuple[AdapterId, str]] = {}
        for install in step.installs:
            reason = self._residents.install(install)
            if reason is not None:
                failed[install.slot] = (install.adapter, reason)
        self._pool.copy(step.copies)
        was_short = self._residents.was_short_of_memory
        runnable = [row for row in step.rows if row.slot not in failed]
        try:
            ran = iter(self._apart.run(runnable) if runnable else ())
        finally:
            self._residents.settle()
        return StepResult(
            step_id=step.id,
            rows=tuple(
                RowResult(request=row.request, branch=row.branch) if row.slot in failed else next(ran)
                for row in step.rows
            ),
            failed_installs=tuple(failed.values()),
            was_short_of_memory=was_short or bool(runnable and self._apart.was_short_of_memory),
        )

    def overlap(self, meanwhile: Callable[[], None]) -> bool:
        """Call `meanwhile` in each step while the device computes it, at least once unless the step has nothing to tell
        or fails. It must not raise. False, and never called, where the device does not work apart from the host."""
        if self._works_apart:
            self._meanwhile = meanwhile
        return self._works_apart

    @property
    def graphs(self) -> StepGraphs | None:
        """The decode steps that are captured, if any are."""
        return self._graphs

    def do_without_graphs(self) -> None:
        """Launch decode steps call by call from now on."""
        self._graphs = None

    def _free(self) -> None:
        """Give back what can be done without."""
        if self._graphs is not None:
            self._graphs.drop()
        if self._base.device.type == "cuda":
            torch.cuda.empty_cache()

    def check(self) -> None:
        """What must hold between steps."""
        self._pool.check()
        if self._cross_pool is not None:
            self._cross_pool.check()

    def _run_rows(self, rows: Sequence[Row]) -> list[RowResult]:
        if self._encoder is not None:
            return self._read_whole(self._encoder, rows)
        kept, logits = self._computed(rows)
        readings = self._read_decoded(rows)
        if logits is None:
            return [_read(row, readings.get(i, ())) for i, row in enumerate(rows)]
        bringing = Bringing()
        chosen_of = self._choose(rows, kept, logits, bringing)
        scores_of = self._score(rows, kept, logits, bringing)
        add_candidates = self._candidates(rows, kept, logits, bringing)
        add_score_tops = self._score_tops(rows, kept, logits, bringing)
        bringing.bring(self._meanwhile)  # the one time that the host waits for the device
        chosen, scores = chosen_of(), scores_of()
        results = [_result(row, chosen.get(i), scores.get(i, ()), readings.get(i, ())) for i, row in enumerate(rows)]
        add_candidates(results)
        add_score_tops(results)
        for i, result in enumerate(results):
            if not (_are_numbers(result) and (i not in chosen or chosen[i].is_number)):
                results[i] = _no_number(rows[i])
        return results

    def _computed(self, rows: Sequence[Row]) -> tuple[list[_Kept], Tensor | None]:
        """The rows that logits are wanted of, and these: by a graph of the step, or call by call."""
        keep = {i: max(len(row.wanted), row.draw is not None) for i, row in enumerate(rows)}
        logits = None if self._graphs is None else self._graphs.logits(rows, self._virtual)
        if logits is not None:  # of every row
            return [_Kept(i, i, 1) for i, count in keep.items() if count], logits
        source = self._passes.encode(rows, self._virtual)
        logits = self._passes.decode(rows, source, keep, self._virtual)
        kept: list[_Kept] = []
        for i, count in keep.items():
            if count:
                kept.append(_Kept(i, kept[-1].last + 1 if kept else 0, count))
        return kept, logits

    def _read_whole(self, encoder: EncoderPass, rows: Sequence[Row]) -> list[RowResult]:
        asks = []
        for row, states in zip(rows, encoder.run(rows), strict=True):
            assert row.reading is not None, f"{row.request}: an encoder's row reads something"
            asks.append(
                Ask(slot=row.slot, reading=row.reading, states_SD=states.states_SD, num_virtual=states.num_virtual)
            )
        return [_read(row, given) for row, given in zip(rows, read(self._heads, asks), strict=True)]

    def _read_decoded(self, rows: Sequence[Row]) -> dict[int, Rows]:
        """The readings of a decoder's rows, by their place; a family without readable states gives none."""
        family = self._base.runs
        if not any(row.reading for row in rows) or not isinstance(family, ReadsStates):
            return {}
        states = torch.split(family.states(), [len(row.tokens) for row in rows])
        wanting = [(i, row.reading) for i, row in enumerate(rows) if row.reading is not None]
        asks = [Ask(slot=rows[i].slot, reading=reading, states_SD=states[i]) for i, reading in wanting]
        return {i: given for (i, _), given in zip(wanting, read(self._heads, asks), strict=True)}

    def _choose(
        self, rows: Sequence[Row], kept: Sequence[_Kept], logits_NV: Tensor, bringing: Bringing
    ) -> Callable[[], dict[int, Chosen]]:
        drawing = [(k, draw) for k in kept if (draw := rows[k.row].draw) is not None and not draw.num_candidates]
        if not drawing:
            return dict
        places = [k.last for k, _ in drawing]
        told = self._sampler.choose(taken(logits_NV, places), [draw for _, draw in drawing], bringing)

        def by_row() -> dict[int, Chosen]:
            chosen = told()
            return {k.row: one for (k, _), one in zip(drawing, chosen, strict=True)}

        return by_row

    def _score(
        self, rows: Sequence[Row], kept: Sequence[_Kept], logits_NV: Tensor, bringing: Bringing
    ) -> Callable[[], dict[int, tuple[tuple[float, ...], ...]]]:
        wanting = [(k, rows[k.row].wanted) for k in kept if rows[k.row].wanted]
        if not wanting:
            return dict
        places = [k.last - len(wanted) + 1 + j for k, wanted in wanting for j in range(len(wanted))]
        told = score(taken(logits_NV, places), [ids for _, w in wanting for ids in w], bringing)

        def by_row() -> dict[int, tuple[tuple[float, ...], ...]]:
            each = iter(told())
            return {k.row: tuple(next(each) for _ in wanted) for k, wanted in wanting}

        return by_row

    def _candidates(self, rows: Sequence[Row], kept: Sequence[_Kept], logits_NV: Tensor, bringing: Bringing) -> AddTo:
        """What the rows of beam searches asked for, and the alternatives to it that are to be reported."""
        asking = [(k, draw) for k in kept if (draw := rows[k.row].draw) is not None and draw.num_candidates]
        if not asking:
            return _no_more
        logits_MV = taken(logits_NV, [k.last for k, _ in asking])
        draws = [draw for _, draw in asking]
        best = candidates(logits_MV, draws, self._base.banned_ids, bringing)
        top = tops(logits_MV, [draw.params.num_top_logprobs for draw in draws], bringing)

        def add(results: list[RowResult]) -> None:
            for (k, _), each, alternatives in zip(asking, best(), top(), strict=True):
                results[k.row] = replace(results[k.row], candidates=each, top=alternatives)

        return add

    def _score_tops(self, rows: Sequence[Row], kept: Sequence[_Kept], logits_NV: Tensor, bringing: Bringing) -> AddTo:
        """The best ids behind each token that something is wanted of."""
        asking = [(k, row) for k in kept if (row := rows[k.row]).wanted and row.num_wanted_top]
        if not asking:
            return _no_more
        places = [k.last - len(row.wanted) + 1 + j for k, row in asking for j in range(len(row.wanted))]
        counts = [row.num_wanted_top if ids else 0 for _, row in asking for ids in row.wanted]
        told = tops(taken(logits_NV, places), counts, bringing)

        def add(results: list[RowResult]) -> None:
            each = iter(told())
            for k, row in asking:
                results[k.row] = replace(results[k.row], score_tops=tuple(next(each) for _ in row.wanted))

        return add


def _no_more(_results: list[RowResult]) -> None:
    """Nobody asked."""


def _result(row: Row, chosen: Chosen | None, scores: tuple[tuple[float, ...], ...], readings: Rows = ()) -> RowResult:
    if chosen is None:
        return RowResult(request=row.request, branch=row.branch, scores=scores, readings=readings)
    return RowResult(
        request=row.request,
        branch=row.branch,
        token=chosen.token,
        logprob=chosen.logprob,
        top=chosen.top,
        scores=scores,
    )


def _read(row: Row, readings: Rows) -> RowResult:
    """The result of a row that chooses nothing."""
    result = _result(row, None, (), readings)
    return result if _are_numbers(result) else _no_number(row)


def _are_numbers(result: RowResult) -> bool:
    """Whether what is to be told of the row can be. A log-probability may be minus infinity."""
    if any(isnan(one.score) for one in result.candidates) or any(isnan(sum(ids)) for ids in result.scores):
        return False
    return all(isfinite(sum(values)) for values in result.readings)


def _no_number(row: Row) -> RowResult:
    """Nothing can be chosen or told where the pass came to NaN or infinity, and nobody else is the worse for it."""
    whose = "the base" if row.slot == BASE_SLOT else "the adapter"
    told = f"{whose} gives values that are no numbers (NaN or infinite) for this request; it was not completed"
    return RowResult(request=row.request, branch=row.branch, failure=Internal(told))


def _pool(base: ResidentBase, shape: KVShape, num_blocks: int, block_size: int, arena: Arena | None = None) -> KVPool:
    dtype, device = base.dtype, base.device
    return KVPool(shape, num_blocks=num_blocks, block_size=block_size, dtype=dtype, device=device, arena=arena)
