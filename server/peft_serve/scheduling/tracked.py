"""Tracked: what the scheduler remembers of one request between its steps.

The record is mutable and belongs to the scheduler alone. Its state moves along `core.TRANSITIONS` only.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from peft_serve.core import TRANSITIONS, AdapterId, Request, RequestId, RequestState
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
class Tracked:
    """A request with its books. `tokens` is the decoder's stream: its prompt, then what was drawn."""

    request: Request
    seq: int  # order of arrival
    tokens: list[int]
    num_prompt: int  # length of the decoder's own prompt in `tokens`
    state: RequestState = RequestState.WAITING
    num_computed: int = 0  # tokens whose KV is in the table
    prefix: int = 0  # positions of the adapter's KV prefix, while running
    rank: int = 0
    lease: Lease | None = None
    table: tuple[int, ...] = ()
    copies: tuple[tuple[int, int], ...] = ()  # to be done in the step of the next row
    cross_blocks: tuple[int, ...] = ()
    num_source: int = 0
    source_is_pending: bool = False
    branches: dict[int, Branch] = field(default_factory=dict)
    open_choices: list[int] = field(default_factory=list)  # to be branched, the next one last
    first_scores: tuple[float, ...] = ()  # log-probabilities of each choice's first token
    scored: dict[int, tuple[float, ...]] = field(default_factory=dict)
    first_step_s: float | None = None
    last_step: int = -1

    @property
    def id(self) -> RequestId:
        return self.request.id

    @property
    def adapter(self) -> AdapterId:
        return self.request.adapter

    @property
    def num_outputs(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def num_positions(self) -> int:
        """Context positions of the tokens known so far, computed or not."""
        return self.prefix + len(self.tokens)

    @property
    def num_left(self) -> int:
        """Tokens of the main table still to compute."""
        return len(self.tokens) - self.num_computed

    @property
    def is_decoding(self) -> bool:
        """Whether the next row is one drawn token."""
        return self.num_computed == len(self.tokens) - 1 and len(self.tokens) > self.num_prompt

    def move(self, state: RequestState) -> None:
        """Change state along the table; any other move is a bug."""
        assert state in TRANSITIONS[self.state], f"request {self.id} cannot go from {self.state} to {state}"
        self.state = state


def track(request: Request, *, seq: int, is_encoder_decoder: bool) -> Tracked:
    """A record for a new request. Raises `ValueError` for a request no step could serve."""
    stream = request.decoder_prompt if is_encoder_decoder else request.prompt
    if not request.prompt or not stream:
        raise ValueError(f"request {request.id} has no tokens to start from: give at least one")
    if not all(request.choices):
        raise ValueError(f"request {request.id} has a choice without tokens: give each at least one")
    if not request.choices and request.sampling.max_new_tokens < 1:
        raise ValueError(f"request {request.id} asks for no token: max_new_tokens must be at least 1")
    if not request.choices and request.sampling.do_sample and request.sampling.seed is None:
        raise ValueError(f"request {request.id} samples without a seed: draw one at admission")
    return Tracked(
        request=request,
        seq=seq,
        tokens=list(stream),
        num_prompt=len(stream),
        source_is_pending=is_encoder_decoder,
        open_choices=[i for i, choice in reversed(list(enumerate(request.choices))) if len(choice) > 1],
    )
