"""A model without tensors: every token depends on its adapter and on the whole history read through the blocks.

A KV cell remembers which adapter wrote which token there. A block given to two requests, a table that points at
the wrong place, a slot with the wrong adapter, a copy that was forgotten: each changes the history that a row
reads, and so its tokens. `alone` computes what a request must get from the request alone.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from peft_serve.core import (
    BASE,
    BASE_SLOT,
    AdapterId,
    Candidate,
    Continuation,
    Draw,
    FinishReason,
    Footprint,
    Install,
    Matcher,
    Reading,
    Request,
    Row,
    RowResult,
    SamplingParams,
    Step,
    StepResult,
)
from peft_serve.errors import InvalidParameter
from peft_serve.scheduling.activation import active_from
from peft_serve.scheduling.beams import Given, begin_search
from peft_serve.scheduling.limits import Limits

VOCABULARY = 11

Cell = tuple[str, AdapterId, int]
"""What is kept at a position: kind ('prefix', 'token', 'soft', 'source'), adapter, and token or place."""


def digest(*things: object) -> int:
    return zlib.crc32(repr(things).encode())


def next_token(adapter: AdapterId, history: Sequence[Cell], source: Sequence[Cell], draw: Draw) -> int:
    """A stand-in for the pass and the sampler."""
    seen = digest(adapter, list(history), list(source), draw.seed, draw.index, draw.prompt_history, draw.output_history)
    token = seen % VOCABULARY
    while token in draw.suppress or not _is_allowed(draw, token):
        token = (token + 1) % VOCABULARY
    return token


def _is_allowed(draw: Draw, token: int) -> bool:
    return draw.allowed is None or bool(draw.allowed[token // 8] >> token % 8 & 1)


def best_tokens(
    adapter: AdapterId, history: Sequence[Cell], source: Sequence[Cell], draw: Draw
) -> tuple[Candidate, ...]:
    """A stand-in for the candidates of a beam: every id that may come, dearest first."""
    place = ("draw", AdapterId(repr((draw.prompt_history, draw.output_history))), draw.index)
    tokens = [token for token in range(VOCABULARY) if token not in draw.suppress]
    scores = dict(zip(tokens, scored(adapter, [*history, place], source, tokens), strict=True))
    ranked = sorted(scores, key=lambda token: (-scores[token], token))
    return tuple(Candidate(t, scores[t], scores[t] - 1) for t in ranked[: draw.num_candidates])


def score(adapter: AdapterId, history: Sequence[Cell], source: Sequence[Cell], token: int) -> float:
    """A stand-in for a log-probability: a dyadic fraction, so that sums are exact in any order."""
    return scored(adapter, history, source, (token,))[0]


def scored(adapter: AdapterId, history: Sequence[Cell], source: Sequence[Cell], tokens: Iterable[int]) -> list[float]:
    """`score` of each of these behind one history, which is looked through once."""
    seen = digest(adapter, list(history), list(source))
    return [-((seen ^ token * 0x9E3779B1) * 0x85EBCA6B % 2**32 >> 20) / 256 for token in tokens]


HEAD_READINGS = (Reading.SEQUENCE, Reading.TOKENS, Reading.SPANS)


def has_head(adapter: AdapterId, reading: Reading) -> bool:
    """Whether the adapter can be read like this; some have no head, or one for another task."""
    return reading not in HEAD_READINGS or digest(adapter, reading) % 4 > 0


def state(adapter: AdapterId, seen: Sequence[Cell], place: int, segments: Sequence[int]) -> tuple[float, ...]:
    """A stand-in for what is read at a place: dyadic fractions."""
    return tuple(scored(adapter, seen, [("segment", adapter, s) for s in segments], (place, place + 1000)))


def pooled(reading: Reading, states: Sequence[tuple[float, ...]]) -> tuple[tuple[float, ...], ...]:
    """A reading of the states of a row's own tokens."""
    if reading is Reading.FIRST:
        return (states[0],)
    if reading in (Reading.LAST, Reading.SEQUENCE):
        return (states[-1],)
    if reading is Reading.MEAN:
        return (tuple(sum(values) / len(states) for values in zip(*states, strict=True)),)
    return tuple(states)


def actor(adapter: AdapterId, footprint: Footprint) -> AdapterId:
    """By what an adapter is known to those who read its cells: some are one and the same to them."""
    return AdapterId(footprint.kv_key or adapter)


def prefix_cells(adapter: AdapterId, footprint: Footprint) -> list[Cell]:
    return [("prefix", actor(adapter, footprint), place) for place in range(footprint.num_prefix_tokens)]


def token_cells(who: AdapterId, tokens: Sequence[int], *, start: int, active_from: int) -> list[Cell]:
    """Tokens from context position `start` on; the adapter acts on those from `active_from` on."""
    return [("token", who if start + i >= active_from else BASE, token) for i, token in enumerate(tokens)]


def source_cells(adapter: AdapterId, footprint: Footprint, source: Sequence[int]) -> list[Cell]:
    soft: list[Cell] = [("soft", adapter, place) for place in range(footprint.num_source_tokens)]
    return soft + [("source", adapter, token) for token in source]


class FakeModel:
    """Runs steps over a dictionary of blocks."""

    def __init__(self, *, num_slots: int, block_size: int, footprints: Mapping[AdapterId, Footprint]) -> None:
        self._num_slots = num_slots
        self._block_size = block_size
        self._footprints = footprints
        self._cells: dict[int, Cell] = {}
        self._cross_cells: dict[int, Cell] = {}
        self.slots: dict[int, AdapterId] = {BASE_SLOT: BASE}
        self._pages: dict[int, list[int]] = {}  # blocks that a slot's adapter lies in

    def run(self, step: Step, *, is_broken: Callable[[AdapterId], bool] = lambda _: False) -> StepResult:
        """The step's results; an adapter that `is_broken` cannot be installed."""
        for slot in step.removes:
            assert slot != BASE_SLOT
            self.slots.pop(slot, None)
            self._pages.pop(slot, None)
        failed = []
        for install in step.installs:
            assert 0 < install.slot <= self._num_slots
            assert install.slot not in self.slots, "an install into a slot that is not empty"
            if is_broken(install.adapter):
                failed.append((install.adapter, "broken"))
                continue
            self.slots[install.slot] = install.adapter
            cells = prefix_cells(install.adapter, self._footprints[install.adapter])
            self._write(self._cells, install.blocks, 0, cells)
            self._lay(install)
        for source, target in step.copies:
            for offset in range(self._block_size):
                cell = self._cells.get(source * self._block_size + offset)
                if cell is not None:
                    self._cells[target * self._block_size + offset] = cell
        broken_slots = {i.slot for i in step.installs if i.slot not in self.slots}
        rows = [row for row in step.rows if row.slot not in broken_slots]
        self._require_disjoint_writes(rows)
        for row in rows:
            self._write_row(row)
        for slot in {row.slot for row in rows}:
            self._require_whole(slot)
        results = tuple(
            RowResult(request=row.request, branch=row.branch) if row.slot in broken_slots else self._read_row(row)
            for row in step.rows
        )
        return StepResult(step_id=step.id, rows=results, failed_installs=tuple(failed))

    def _lay(self, install: Install) -> None:
        """The adapter fills the blocks that it was given."""
        runs = self._footprints[install.adapter].runs
        assert len(install.pages) == len(runs), "an adapter has a block for each of its runs to begin at"
        pages = [first + i for first, length in zip(install.pages, runs, strict=True) for i in range(length)]
        cells: list[Cell] = [("page", install.adapter, place) for place in range(len(pages) * self._block_size)]
        self._write(self._cells, pages, 0, cells)
        self._pages[install.slot] = pages

    def _require_whole(self, slot: int) -> None:
        """Nobody has written into the adapter since it was installed."""
        for page in self._pages.get(slot, ()):
            kind, owner, _ = self._cells[page * self._block_size]
            assert (kind, owner) == ("page", self.slots[slot]), f"somebody wrote into {self.slots[slot]}"

    def _write_row(self, row: Row) -> None:
        adapter = self.slots[row.slot]
        who = actor(adapter, self._footprints[adapter])
        cells = token_cells(who, row.tokens, start=row.start, active_from=row.active_from)
        self._write(self._cells, row.blocks, row.start, cells)
        if row.source:
            cells = source_cells(adapter, self._footprints[adapter], row.source)
            assert len(cells) == row.num_source
        if row.source and row.cross_blocks:
            self._write(self._cross_cells, row.cross_blocks, 0, cells)

    def _read_row(self, row: Row) -> RowResult:
        adapter = self.slots[row.slot]
        if row.reading is not None and row.source:
            return self._read_whole(row, row.reading)
        end = row.start + len(row.tokens)
        history = self._read(self._cells, row.blocks, end)
        source = self._read(self._cross_cells, row.cross_blocks, row.num_source)
        first = end - len(row.wanted)
        scores = tuple(
            tuple(scored(adapter, history[: first + i + 1], source, wanted) if wanted else ())
            for i, wanted in enumerate(row.wanted)
        )
        token: int | None = None
        candidates: tuple[Candidate, ...] = ()
        if row.draw is not None and row.draw.num_candidates:
            candidates = best_tokens(adapter, history, source, row.draw)
        elif row.draw is not None:
            token = next_token(adapter, history, source, row.draw)
        tops = tuple(
            tuple(
                enumerate(scored(adapter, history[: first + i + 1], source, range(row.num_wanted_top)) if ids else ())
            )
            for i, ids in enumerate(row.wanted)
        )
        readings: tuple[tuple[float, ...], ...] = ()
        if row.reading is not None and has_head(adapter, row.reading):
            places = range(row.start, end)
            states = [
                state(adapter, history[: place + 1], place, (segment,))
                for place, segment in zip(places, row.segments or [0] * len(places), strict=True)
            ]
            readings = pooled(row.reading, states)
        return RowResult(
            request=row.request,
            branch=row.branch,
            token=token,
            scores=scores,
            score_tops=tops,
            candidates=candidates,
            readings=readings,
        )

    def _read_whole(self, row: Row, reading: Reading) -> RowResult:
        """The row of an encoder: everything it reads comes with it."""
        assert (row.tokens, row.blocks, row.draw) == ((), (), None), "an encoder keeps nothing and draws nothing"
        adapter = self.slots[row.slot]
        cells = source_cells(adapter, self._footprints[adapter], row.source)
        assert len(cells) == row.num_source
        states = [state(adapter, cells, place, row.segments) for place in range(len(row.source))]
        return RowResult(request=row.request, readings=pooled(reading, states) if has_head(adapter, reading) else ())

    def _require_disjoint_writes(self, rows: Sequence[Row]) -> None:
        written = [self._place(r.blocks, r.start + i) for r in rows for i in range(len(r.tokens))]
        assert len(written) == len(set(written)), "two rows write to one place"

    def _place(self, blocks: Sequence[int], position: int) -> int:
        block = blocks[position // self._block_size]
        assert block > 0, "the padding block is in a table"
        return block * self._block_size + position % self._block_size

    def _write(self, cells: dict[int, Cell], blocks: Sequence[int], start: int, new: Sequence[Cell]) -> None:
        for i, cell in enumerate(new):
            cells[self._place(blocks, start + i)] = cell

    def _read(self, cells: Mapping[int, Cell], blocks: Sequence[int], end: int) -> list[Cell]:
        return [cells[self._place(blocks, position)] for position in range(end)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a request gets."""

    tokens: tuple[int, ...] = ()
    continuations: tuple[Continuation, ...] = ()
    prompt_logprobs: tuple[float, ...] = ()
    reason: FinishReason | None = None
    logprobs: tuple[float, ...] = ()
    rows: tuple[tuple[float, ...], ...] = ()
    is_invalid: bool = False


def alone(request: Request, footprint: Footprint, limits: Limits, *, capacity: int, cross_capacity: int) -> Answer:
    """What the request must get, computed without any scheduler. Too long is FAILED, with what came before."""
    if request.reading is not None:
        return _read_alone(request, request.reading, footprint, limits, capacity=capacity)
    adapter, params = request.adapter, request.sampling
    is_seq2seq = limits.is_encoder_decoder
    source = source_cells(adapter, footprint, request.prompt) if is_seq2seq else []
    stream = list(request.decoder_prompt if is_seq2seq else request.prompt)
    num_prefix, size = footprint.num_prefix_tokens, limits.block_size

    def needed_blocks(num_tokens: int) -> int:
        own = limits.blocks_for(num_prefix + num_tokens) - num_prefix // size
        return limits.blocks_for(num_prefix) + own

    who = actor(adapter, footprint)
    begin = active_from(stream, footprint.start, prefix=num_prefix)

    def history(choice: Sequence[int] = ()) -> list[Cell]:
        tokens = token_cells(who, [*stream, *choice], start=num_prefix, active_from=begin)
        return [*prefix_cells(adapter, footprint), *tokens]

    longest = max((len(choice) - 1 for choice in request.choices), default=min(params.max_new_tokens, 1))
    start = num_prefix + len(stream)
    branch = limits.blocks_for(start + longest) - start // size if request.choices and longest else 0
    too_long = start + longest > limits.max_context or needed_blocks(len(stream)) + branch > capacity
    if too_long or (is_seq2seq and limits.blocks_for(len(source)) > cross_capacity):
        return Answer(reason=FinishReason.FAILED)
    if request.choices:
        return Answer(
            reason=FinishReason.EOS,
            logprobs=tuple(
                sum(score(adapter, history(choice[:i]), source, token) for i, token in enumerate(choice))
                for choice in request.choices
            ),
        )
    told: tuple[float, ...] = ()
    if request.prompt_logprobs is not None:
        cells, num_prompt = history(), len(stream)
        told = tuple(score(adapter, cells[: num_prefix + i], source, stream[i]) for i in range(1, num_prompt))
    if not params.max_new_tokens:
        return Answer(reason=FinishReason.LENGTH, prompt_logprobs=told)
    if params.num_beams > 1:
        most = min(params.max_new_tokens, limits.max_context - start)
        worst = params.num_beams * (limits.blocks_for(start + most) - start // size)
        if needed_blocks(len(stream)) + worst > capacity:
            return Answer(reason=FinishReason.FAILED)
        return _searched_alone(request, lambda tokens: (history(tokens), source), most=most, prompt_logprobs=told)
    tokens: list[int] = []
    while needed_blocks(len(stream)) <= capacity:
        draw = _draw_alone(request, params, tokens, is_seq2seq=is_seq2seq)
        token = next_token(adapter, history(), source, draw)
        tokens.append(token)
        stream.append(token)
        if token in request.eos_ids and not params.ignore_eos:
            return Answer(tokens=tuple(tokens), reason=FinishReason.EOS, prompt_logprobs=told)
        if len(tokens) == params.max_new_tokens or num_prefix + len(stream) == limits.max_context:
            return Answer(tokens=tuple(tokens), reason=FinishReason.LENGTH, prompt_logprobs=told)
        try:
            matcher = _matched(request, tokens)
        except InvalidParameter:
            return Answer(tokens=tuple(tokens), reason=FinishReason.FAILED, prompt_logprobs=told, is_invalid=True)
        if matcher is not None and matcher.is_over and params.ignore_eos:
            return Answer(tokens=tuple(tokens), reason=FinishReason.EOS, prompt_logprobs=told)
    return Answer(tokens=tuple(tokens), reason=FinishReason.FAILED, prompt_logprobs=told)


def _searched_alone(
    request: Request,
    seen: Callable[[Sequence[int]], tuple[list[Cell], list[Cell]]],
    *,
    most: int,
    prompt_logprobs: tuple[float, ...],
) -> Answer:
    """`BeamSearch` over histories that no cache had a part in."""
    search = begin_search(request, max_new_tokens=most)
    is_seq2seq = bool(request.decoder_prompt)
    while not search.is_over:
        given = []
        for beam in search.running:
            draw = _draw_alone(request, request.sampling, list(beam.tokens), is_seq2seq=is_seq2seq)
            draw = replace(draw, num_candidates=search.num_candidates)
            given.append(Given(best_tokens(request.adapter, *seen(beam.tokens), draw)))
        search.advance(given)
    best = search.best(request.sampling.num_sequences)
    reason = FinishReason.EOS if best[0].is_ended else FinishReason.LENGTH
    return Answer(continuations=best, reason=reason, prompt_logprobs=prompt_logprobs)


def _read_alone(request: Request, reading: Reading, footprint: Footprint, limits: Limits, *, capacity: int) -> Answer:
    adapter, prompt = request.adapter, request.prompt
    virtual = footprint.num_source_tokens if limits.is_encoder else footprint.num_prefix_tokens
    if limits.is_encoder:
        is_too_long = False
        cells = source_cells(adapter, footprint, prompt)
        states = [state(adapter, cells, place, request.segments) for place in range(len(prompt))]
    else:
        own = limits.blocks_for(virtual + len(prompt)) - virtual // limits.block_size
        is_too_long = limits.blocks_for(virtual) + own > capacity
        begin = active_from(prompt, footprint.start, prefix=virtual)
        tokens = token_cells(actor(adapter, footprint), prompt, start=virtual, active_from=begin)
        cells = [*prefix_cells(adapter, footprint), *tokens]
        segments = request.segments or (0,) * len(prompt)
        states = [state(adapter, cells[: virtual + i + 1], virtual + i, (segments[i],)) for i in range(len(prompt))]
    if is_too_long or virtual + len(prompt) > limits.max_context:
        return Answer(reason=FinishReason.FAILED)
    if not has_head(adapter, reading):
        return Answer(reason=FinishReason.FAILED, is_invalid=True)
    return Answer(reason=FinishReason.READ, rows=pooled(reading, states))


def _draw_alone(request: Request, params: SamplingParams, tokens: list[int], *, is_seq2seq: bool) -> Draw:
    prompt = request.decoder_prompt if is_seq2seq else request.prompt
    matcher = _matched(request, tokens)
    is_over = matcher is not None and matcher.is_over
    holds_back = len(tokens) < params.min_new_tokens and not params.ignore_eos and not is_over
    return Draw(
        allowed=None if matcher is None else matcher.mask(),
        params=params,
        seed=params.seed or 0,
        index=len(tokens),
        prompt_history=prompt if params.needs_history else (),
        output_history=tuple(tokens) if params.needs_history else (),
        suppress=tuple(sorted(request.eos_ids)) if holds_back else (),
    )


def _matched(request: Request, tokens: Sequence[int]) -> Matcher | None:
    """What constrains the request, behind these tokens of its answer."""
    if request.constraint is None:
        return None
    matcher = request.constraint.start()
    for token in tokens:
        matcher.accept(token)
    return matcher
