"""Tracked: what the scheduler remembers of one request between its steps.

The record is mutable and belongs to the scheduler alone. Its state moves along `core.TRANSITIONS` only.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from peft_serve.core import (
    TRANSITIONS,
    AdapterId,
    Footprint,
    Matcher,
    Reading,
    Request,
    RequestId,
    RequestState,
    RowResult,
)
from peft_serve.scheduling.activation import active_from
from peft_serve.scheduling.beams import BeamSearch
from peft_serve.scheduling.limits import Limits
from peft_serve.scheduling.slots import Lease


@dataclass(slots=True, eq=False)
class Branch:
    """One choice of a scoring request, on its way through the model behind the prompt."""

    choice: tuple[int, ...]
    blocks: tuple[int, ...]
    copies: tuple[tuple[int, int], ...]
    num_computed: int = 0
    scores: list[float] = field(default_factory=list)  # of choice[1:], as far as they are known

    @property
    def num_left(self) -> int:
        """Tokens still to compute: the last token of a choice is scored and never computed."""
        return len(self.choice) - 1 - self.num_computed


@dataclass(slots=True, eq=False)
class Beam:
    """One running beam on its way through the model behind the prompt: a `Hypothesis` with its keys and values."""

    tokens: tuple[int, ...]
    num_computed: int = 0
    blocks: tuple[int, ...] = ()  # empty: it has no table yet
    origin: Beam | None = None  # whose table it forks, up to `num_computed`; None: the prompt's
    copies: tuple[tuple[int, int], ...] = ()
    given: RowResult | None = None  # what the model says behind its last token

    @property
    def num_left(self) -> int:
        """Tokens still to compute; the last one is computed too, for its candidates."""
        return len(self.tokens) - self.num_computed


@dataclass(slots=True, eq=False)
class Tracked:
    """A request with its books. `tokens` is the decoder's stream: its prompt, then what was drawn.

    On an encoder it is empty, and the prompt is the source.
    """

    request: Request
    seq: int  # order of arrival
    tokens: list[int]
    num_prompt: int  # length of the decoder's own prompt in `tokens`
    state: RequestState = RequestState.WAITING
    footprint: Footprint | None = None  # of its adapter
    num_computed: int = 0  # tokens whose KV is in the table
    prefix: int = 0  # positions of the adapter's KV prefix
    num_unplaced: int = 0  # of these, positions that count for no token
    active_from: int = 0  # context position of the first token that the adapter acts on
    rank: int = 0
    lease: Lease | None = None
    table: tuple[int, ...] = ()
    labels: list[bytes] = field(default_factory=list)  # of its full blocks behind the adapter's prefix, as they fill
    num_labelled: int = 0  # of these, blocks of the table that have theirs
    num_cached: int = 0  # tokens it did not compute when it first began
    copies: tuple[tuple[int, int], ...] = ()  # to be done in the step of the next row
    cross_blocks: tuple[int, ...] = ()
    num_source: int = 0
    source_is_pending: bool = False
    branches: dict[int, Branch] = field(default_factory=dict)
    open_choices: list[int] = field(default_factory=list)  # to be branched, the next one last
    first_scores: tuple[float, ...] = ()  # log-probabilities of each choice's first token
    scored: dict[int, tuple[float, ...]] = field(default_factory=dict)
    readings: list[tuple[float, ...]] = field(default_factory=list)  # of the tokens computed so far
    search: BeamSearch | None = None  # once the prompt has been read
    beams: list[Beam] = field(default_factory=list)  # of its running hypotheses, in their order
    prompt_scores: list[float] = field(default_factory=list)  # log-probabilities of the prompt's tokens so far
    prompt_tops: list[tuple[tuple[int, float], ...]] = field(default_factory=list)  # parallel
    is_prompt_told: bool = False  # they have become an event
    matcher: Matcher | None = None  # of a constrained answer
    allowed: bytes | None = None  # what may come next by it
    first_step_s: float | None = None
    loaded_s: float | None = None  # when the load that it waited for was over
    last_step: int = -1

    @property
    def id(self) -> RequestId:
        return self.request.id

    @property
    def adapter(self) -> AdapterId:
        return self.request.adapter

    @property
    def is_waiting(self) -> bool:
        return self.state in (RequestState.WAITING, RequestState.LOADING)

    @property
    def num_outputs(self) -> int:
        """Tokens of its answer, the best one if it is a search's."""
        if self.search is None:
            return len(self.tokens) - self.num_prompt
        return sum(len(best.tokens) for best in self.search.best(1) if self.search.is_over)

    @property
    def num_rows(self) -> int:
        """Of the rows that may be in one step, those it counts for."""
        return self.request.sampling.num_beams if self.is_searching else 1

    @property
    def is_searching(self) -> bool:
        """Whether the answer is found by beam search."""
        return _draws(self.request) and self.request.sampling.num_beams > 1

    @property
    def wants_prompt(self) -> bool:
        """Whether the log-probabilities of its prompt are still to be computed."""
        return self.request.prompt_logprobs is not None and not self.is_prompt_told

    @property
    def num_positions(self) -> int:
        """Context positions of the tokens known so far, computed or not."""
        return self.prefix + len(self.tokens)

    @property
    def num_placed(self) -> int:
        """Of these, the ones that count as positions of the context."""
        return self.num_positions - self.num_unplaced

    @property
    def prompt_positions(self) -> tuple[int, int]:
        """Context positions [first, last) of the decoder's own prompt."""
        return self.prefix, self.prefix + self.num_prompt

    @property
    def num_left(self) -> int:
        """Tokens of the main table still to compute."""
        return len(self.tokens) - self.num_computed

    @property
    def is_read(self) -> bool:
        """Whether everything there is to read has been through the model."""
        return self.num_left == 0 and not self.source_is_pending

    @property
    def is_decoding(self) -> bool:
        """Whether the next row is one drawn token."""
        return self.num_computed == len(self.tokens) - 1 and len(self.tokens) > self.num_prompt

    def learn(self, footprint: Footprint) -> None:
        """What the request's adapter asks of the device, known when it is ready for the first time."""
        if footprint == self.footprint:
            return
        self.footprint = footprint
        self.prefix, self.rank = footprint.num_prefix_tokens, footprint.max_rank
        self.num_unplaced = footprint.num_unplaced
        self.active_from = active_from(self.tokens[: self.num_prompt], footprint.start, prefix=self.prefix)
        self.labels.clear()

    def follow(self, token: int) -> None:
        """The answer goes on with a token that was drawn; raises what the constraint raises."""
        if self.matcher is not None:
            self.matcher.accept(token)
            self.allowed = self.matcher.mask()

    @property
    def is_complete(self) -> bool:
        """Whether its constraint lets nothing follow."""
        return self.matcher is not None and self.matcher.is_over

    def move(self, state: RequestState) -> None:
        """Change state along the table; any other move is a bug."""
        assert state in TRANSITIONS[self.state], f"request {self.id} cannot go from {self.state} to {state}"
        self.state = state


def track(request: Request, limits: Limits, *, seq: int) -> Tracked:
    """A record for a new request. Raises `ValueError` for a request no step could serve."""
    stream = request.decoder_prompt if limits.is_encoder_decoder else request.prompt
    if not request.prompt or not stream:
        raise ValueError(f"request {request.id} has no tokens to start from: give at least one")
    _require_purpose(request, limits)
    if limits.is_encoder:
        stream = ()
    elif request.reading is Reading.SEQUENCE:
        stream = _without_padding(stream, limits.pad_id)
    if not all(request.choices):
        raise ValueError(f"request {request.id} has a choice without tokens: give each at least one")
    if _draws(request):
        _require_drawable(request, limits)
    elif request.prompt_logprobs is not None:
        raise ValueError(f"request {request.id} wants log-probabilities of its prompt: let it generate")
    matcher = None if request.constraint is None else request.constraint.start()
    return Tracked(
        request=request,
        seq=seq,
        tokens=list(stream),
        num_prompt=len(stream),
        matcher=matcher,
        allowed=None if matcher is None else matcher.mask(),
        source_is_pending=limits.is_encoder_decoder or limits.is_encoder,
        open_choices=[i for i, choice in reversed(list(enumerate(request.choices))) if len(choice) > 1],
    )


def _draws(request: Request) -> bool:
    """Whether it generates."""
    return not request.choices and request.reading is None


def _require_drawable(request: Request, limits: Limits) -> None:
    """Raise `ValueError` for parameters that no answer can be drawn by."""
    params = request.sampling
    if params.max_new_tokens < (1 if request.prompt_logprobs is None else 0):
        raise ValueError(f"request {request.id} asks for no token: max_new_tokens must be at least 1")
    if params.do_sample and params.seed is None:
        raise ValueError(f"request {request.id} samples without a seed: draw one at admission")
    if params.num_beams > 1 and request.constraint is not None:
        raise ValueError(f"request {request.id} has beams and a grammar: choose one of them")
    if params.num_beams > 1 and params.do_sample:
        raise ValueError(f"request {request.id} samples and has beams: choose one of them")
    if not 1 <= params.num_sequences <= params.num_beams <= limits.max_rows:
        raise ValueError(
            f"request {request.id} wants {params.num_sequences} sequences of {params.num_beams} beams: give at least "
            f"as many beams as sequences, and at most {limits.max_rows} (max_rows)"
        )


def _without_padding(tokens: tuple[int, ...], pad_id: int | None) -> tuple[int, ...]:
    """The tokens up to the one that transformers' `...ForSequenceClassification` of a decoder reads.

    What follows it is never looked at: attention is causal.
    """
    end = len(tokens)
    while end > 1 and tokens[end - 1] == pad_id:
        end -= 1
    return tokens[:end]


def _require_purpose(request: Request, limits: Limits) -> None:
    """Raise `ValueError` when the base cannot do what the request is for."""
    if limits.is_encoder and request.reading is None:
        raise ValueError(f"request {request.id} asks an encoder for text: give it a reading")
    if limits.is_encoder_decoder and request.reading is not None:
        raise ValueError(f"request {request.id} asks an encoder-decoder for a reading: it only generates")
    if request.reading is not None and request.choices:
        raise ValueError(f"request {request.id} has choices and a reading: give one of them")
    if request.segments and len(request.segments) != len(request.prompt):
        raise ValueError(f"request {request.id} has {len(request.segments)} segments: give one for each prompt token")
