"""The vocabulary: what a request, a row and a step are.

Everything here is a frozen fact that crosses a floor of the building. The words mean one thing each:

request   what a caller asked for, resolved to token ids and to one adapter id
adapter   a compiled checkpoint; its *id* is the digest of its files, its *name* an alias that may move
slot      an adapter's place on the device; slot 0 is the base model, the adapter that changes nothing
block     a fixed number of KV-cache positions; block 0 is padding and is never given to a request
step      one forward pass; a *row* is one request's part of it
plan -> run -> commit   the scheduler plans a `Step`, the model runs it, the scheduler commits its `StepResult`

This module knows no torch, no HTTP and no file system.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final, Literal, NewType, Protocol

AdapterId = NewType("AdapterId", str)
"""`sha256:<64 hex>` of an adapter's files, or `BASE`."""

RequestId = NewType("RequestId", str)

BASE: Final = AdapterId("base")
"""The adapter id of the base model itself: no adapter."""

BASE_SLOT: Final = 0
PADDING_BLOCK: Final = 0


class Reading(StrEnum):
    """What is read from one pass over a prompt, by a request that generates nothing."""

    SEQUENCE = "sequence"  # the task head's logits of the whole sequence: one row [labels]
    TOKENS = "tokens"  # the task head's logits of each prompt token: a row [labels] for each
    SPANS = "spans"  # the task head's start and end logits of each prompt token: a row [2] for each
    FIRST = "first"  # the last hidden state of the first position: one row [hidden]
    LAST = "last"  # the last hidden state of the last position: one row [hidden]
    MEAN = "mean"  # the mean of the prompt's last hidden states: one row [hidden]


class FinishReason(StrEnum):
    """Why a request ended."""

    READ = "read"  # it generates nothing, and what it reads is read
    EOS = "eos"  # the model produced an end-of-sequence id
    STOP = "stop"  # a stop string was found in the text
    LENGTH = "length"  # max_new_tokens, or the context, is used up
    CANCELLED = "cancelled"  # the caller went away or asked to stop
    FAILED = "failed"  # its adapter or its step failed; the event carries the error


class RequestState(StrEnum):
    """Where a request stands. `TRANSITIONS` holds every legal move."""

    WAITING = "waiting"  # in the queue
    LOADING = "loading"  # its adapter is on the way to the host or the device
    RUNNING = "running"  # has blocks and a slot lease: prefill, decode and scoring
    FINISHED = "finished"


TRANSITIONS: Final[dict[RequestState, frozenset[RequestState]]] = {
    RequestState.WAITING: frozenset({RequestState.LOADING, RequestState.RUNNING, RequestState.FINISHED}),
    RequestState.LOADING: frozenset({RequestState.WAITING, RequestState.FINISHED}),
    RequestState.RUNNING: frozenset({RequestState.WAITING, RequestState.FINISHED}),  # WAITING: preempted
    RequestState.FINISHED: frozenset(),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the next token is chosen. The defaults are greedy decoding of 20 tokens."""

    max_new_tokens: int = 20
    min_new_tokens: int = 0
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0  # 0 = off
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0  # over prompt and output ids (CTRL, as in transformers)
    frequency_penalty: float = 0.0  # over output ids (OpenAI)
    presence_penalty: float = 0.0  # over output ids (OpenAI)
    seed: int | None = None  # None: the engine draws one at admission
    ignore_eos: bool = False
    logprobs: bool = False  # report the chosen token's log-probability
    num_top_logprobs: int = 0  # and this many alternatives
    logit_bias: tuple[tuple[int, float], ...] = ()  # (id, what is added to its logit before everything else)
    num_beams: int = 1  # more than one: beam search, as in transformers; nothing is sampled
    num_sequences: int = 1  # of the search's best continuations, so many are told
    length_penalty: float = 1.0  # the exponent of the length that a continuation's log-probability is divided by
    early_stopping: bool | Literal["never"] = False  # when the search gives up looking for something better

    @property
    def needs_history(self) -> bool:
        """Whether choosing the next token reads the ids that came before."""
        return self.repetition_penalty != 1.0 or self.frequency_penalty != 0.0 or self.presence_penalty != 0.0


class Matcher(Protocol):
    """How far one answer has come in what constrains it. Belongs to that answer alone, and may raise `ServeError`."""

    @property
    def is_over(self) -> bool:
        """Whether nothing can follow but the end."""
        ...

    def mask(self) -> bytes:
        """The ids that may come next: id i is bit i % 8 of byte i // 8. An end of sequence may where the answer may."""
        ...

    def accept(self, token: int) -> None:
        """The answer goes on with this id, one that the mask allows."""
        ...


class Constraint(Protocol):
    """What an answer has to look like: a grammar, ready to be matched any number of times."""

    def start(self) -> Matcher: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One admitted generation (or one scoring of `choices`), all names resolved.

    On a decoder-only base `prompt` is the prompt and `decoder_prompt` is empty. On an encoder-decoder base
    `prompt` is the source text for the encoder and `decoder_prompt` what the decoder starts with (usually the
    decoder start token).
    """

    id: RequestId
    adapter: AdapterId
    prompt: tuple[int, ...]
    decoder_prompt: tuple[int, ...] = ()
    sampling: SamplingParams = field(default_factory=SamplingParams)
    eos_ids: frozenset[int] = frozenset()
    forced_first: int | None = None  # the base insists that an answer begins with this id (BART), and
    forced_last: int | None = None  # that the last token of a full-length answer is this one
    choices: tuple[tuple[int, ...], ...] = ()  # token ids of each choice; not empty = score, do not generate
    reading: Reading | None = None  # not None = read one pass over the prompt, do not generate
    constraint: Constraint | None = None  # what the answer has to look like
    segments: tuple[int, ...] = ()  # token type of each prompt token (BERT's second sentence: 1); empty = all 0
    tenant: str = ""  # whose it is: tenants share no keys and values, and are served side by side,
    tenant_weight: float = 1.0  # one of weight 2 with twice the tokens of one of weight 1
    arrival_s: float = 0.0
    deadline_s: float | None = None  # on the clock of `arrival_s`: end it, unless its first step comes before
    max_time_s: float | None = None  # from its first step: the token that comes then is the last one
    prompt_logprobs: int | None = None  # not None = report those of the (decoder's) prompt, and so many alternatives
    is_trial: bool = False  # the server's own, to try an upload out: nobody's traffic


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """What a compiled adapter asks of the device."""

    num_bytes: int
    max_rank: int = 0  # the largest low-rank rank over all sites
    num_prefix_tokens: int = 0  # KV positions in front of the (decoder's) tokens: a prefix, or a soft prompt
    num_source_tokens: int = 0  # soft-prompt embeddings in front of the encoder's tokens
    num_cross_tokens: int = 0  # encoder-decoder: KV positions in front of the encoded source
    num_unplaced: int = 0  # of the positions in front, those that take none from the tokens behind them
    start: tuple[int, ...] = ()  # ids whose last occurrence in the prompt switches the adapter on; empty: always on
    kv_key: str | None = None  # adapters with one key give the same keys and values; None: no other does
    is_causal: bool = True  # keys and values of a token depend on no token behind it
    runs: tuple[int, ...] = ()  # neighbouring blocks that each part of it fills, where adapters lie among KV blocks


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """Choose one next token after the row's last token."""

    params: SamplingParams
    seed: int
    index: int  # how many tokens the request has produced so far: the draw's place in its random stream
    prompt_history: tuple[int, ...] = ()  # filled only when `params.needs_history`
    output_history: tuple[int, ...] = ()
    suppress: tuple[int, ...] = ()  # ids that must not be chosen (end of sequence before min_new_tokens)
    forced: int | None = None  # the token, whatever the logits say
    allowed: bytes | None = None  # one of these ids, as `Matcher.mask` tells them; None: any
    num_candidates: int = 0  # not 0 = tell so many of the best tokens, for a beam search, and choose none


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One request's part of a step.

    Positions are context positions: they count the adapter's KV prefix, so that the position of a token is
    also its place in the block table (`blocks[position // block_size]`, offset `position % block_size`).
    """

    request: RequestId
    slot: int
    tokens: tuple[int, ...]  # ids computed in this step, on the decoder of an encoder-decoder
    start: int  # context position of tokens[0]
    blocks: tuple[int, ...]  # block table covering at least start + len(tokens) positions
    draw: Draw | None = None  # None: this is a prefill chunk, no token is chosen
    wanted: tuple[tuple[int, ...], ...] = ()  # log-probabilities asked for: one tuple of ids for each of the
    # last len(wanted) tokens of the row, read from that token's next-token distribution
    num_wanted_top: int = 0  # and so many of the best ids there
    branch: int = 0  # which continuation of the request this is (choices are scored side by side)
    source: tuple[int, ...] = ()  # encoder-decoder: ids to encode in this step, in the row's first step only
    cross_blocks: tuple[int, ...] = ()  # encoder-decoder: where the cross-attention KV is kept
    num_source: int = 0  # encoder-decoder: length of the cross-attention KV, soft prompt and prefix included
    num_unplaced: int = 0  # context positions in front that count for no token: its position id is that much less
    active_from: int = 0  # context position of the first token the adapter acts on; the ones before are the base's
    prompt: tuple[int, int] = (0, 0)  # context positions [first, last) of the request's own prompt on the decoder
    reading: Reading | None = None  # what to read from this row's tokens
    segments: tuple[int, ...] = ()  # token type of each token the row brings; empty = all 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Install:
    """Put an adapter into a slot before the pass; `blocks` hold its KV prefix."""

    slot: int
    adapter: AdapterId
    blocks: tuple[int, ...] = ()
    pages: tuple[int, ...] = ()  # the first block of each of its `Footprint.runs`


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One forward pass, as planned. The order of work is: removes, installs, copies, pass, choice of tokens.

    `rows` are sorted by slot, so that the tokens of one adapter are contiguous.
    """

    id: int
    rows: tuple[Row, ...]
    removes: tuple[int, ...] = ()  # slots to empty
    installs: tuple[Install, ...] = ()
    copies: tuple[tuple[int, int], ...] = ()  # (from block, to block): copy-on-write of KV blocks

    @property
    def num_tokens(self) -> int:
        """Tokens computed in the step, encoder tokens included."""
        return sum(len(row.tokens) + len(row.source) for row in self.rows)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A token that a beam may go on with."""

    token: int
    score: float  # its log-probability after bias, penalties and what must not or has to come
    logprob: float  # that of the model's own logits


@dataclass(frozen=True, slots=True, kw_only=True)
class RowResult:
    """What a row gave: a token if it drew one, scores if it wanted some."""

    request: RequestId
    branch: int = 0
    token: int | None = None
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()  # (id, log-probability), best first
    scores: tuple[tuple[float, ...], ...] = ()  # parallel to Row.wanted
    score_tops: tuple[tuple[tuple[int, float], ...], ...] = ()  # parallel to it too, if Row.num_wanted_top
    candidates: tuple[Candidate, ...] = ()  # as Draw.num_candidates asks, best first
    readings: tuple[tuple[float, ...], ...] = ()  # what Row.reading asked for, of the tokens of this row
    failure: Exception | None = None  # why it gave nothing: its request fails, and no other does


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What a step gave, parallel to its rows; an adapter that could not be installed fails alone."""

    step_id: int
    rows: tuple[RowResult, ...]
    failed_installs: tuple[tuple[AdapterId, str], ...] = ()  # (adapter, reason); its rows were not run
    was_short_of_memory: bool = False  # whatever came of it: adapters that nobody uses should go


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenEvent:
    """A request has one more token."""

    request: RequestId
    index: int
    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    is_last: bool = False  # its `FinishEvent` comes next


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoresEvent:
    """Log-probabilities of a request's choices: the sum over each choice's tokens, and each token's own."""

    request: RequestId
    logprobs: tuple[float, ...]
    token_logprobs: tuple[tuple[float, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptEvent:
    """Log-probabilities of the decoder's prompt, of the tokens behind its first one; before any token is drawn."""

    request: RequestId
    logprobs: tuple[float, ...]
    tops: tuple[tuple[tuple[int, float], ...], ...]  # parallel; (id, log-probability), best first


@dataclass(frozen=True, slots=True, kw_only=True)
class Continuation:
    """A finished beam."""

    tokens: tuple[int, ...]
    score: float  # the sum of its candidates' scores, divided by the length penalty
    logprobs: tuple[float, ...]  # of each token, by the model's own logits
    tops: tuple[tuple[tuple[int, float], ...], ...]  # the alternatives to each
    is_ended: bool  # by an end-of-sequence id; False: by its length


@dataclass(frozen=True, slots=True, kw_only=True)
class BeamsEvent:
    """What a beam search came to: the best continuations, best first."""

    request: RequestId
    continuations: tuple[Continuation, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadingEvent:
    """What a request read: rows as `Reading` says."""

    request: RequestId
    rows: tuple[tuple[float, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishEvent:
    """A request has ended and everything it held is given back."""

    request: RequestId
    reason: FinishReason
    error: Exception | None = None
    queue_s: float = 0.0  # from arrival to its first step
    load_s: float = 0.0  # of these, until its adapter was on the host; 0: it was there
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    num_cached_tokens: int = 0  # of the prompt, found in the prefix cache when the request began


Event = TokenEvent | ScoresEvent | PromptEvent | BeamsEvent | ReadingEvent | FinishEvent
