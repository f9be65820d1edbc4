"""Everything a running server is made of, in one frozen object that the HTTP floor is given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from peft_serve.adapters.catalog import Catalog
from peft_serve.adapters.findings import Inspection
from peft_serve.adapters.records import CheckpointFiles, HeadFacts
from peft_serve.adapters.sources.opening import Sources
from peft_serve.config import Settings
from peft_serve.engine.client import EngineThread
from peft_serve.engine.following import StoreFollower
from peft_serve.metrics import Metrics
from peft_serve.rendering.templates import ChatTemplates
from peft_serve.text import TextCodec


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseCard:
    """The base as callers may know it."""

    name: str  # served model name
    family: str
    class_name: str
    dtype: str
    device: str
    num_parameters: int
    is_encoder_decoder: bool
    vocab_size: int  # rows of the embedding; a larger id cannot be computed
    max_context: int  # positions, prompt and new tokens together
    eos_ids: frozenset[int]
    decoder_start: tuple[int, ...]  # what the decoder of an encoder-decoder begins with
    forced_first: int | None = None  # an answer has to begin with this id
    forced_last: int | None = None  # an answer of full length has to end with this id
    is_encoder: bool = False  # it generates nothing; heads and embeddings read its last hidden states
    head: HeadFacts | None = None  # the base's own task head
    labels: tuple[str, ...] = ()  # what that head's outputs are called
    quantisation: str | None = None  # what its linear weights are stored in; None: as they are computed with


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerParts:
    """The parts of a server; `engine.assembly.build` makes them from `Settings`."""

    settings: Settings
    base: BaseCard
    codec: TextCodec
    catalog: Catalog
    inspect: Callable[[CheckpointFiles], Inspection]  # the gate, for uploads that are only to be validated
    engine: EngineThread
    metrics: Metrics
    clock: Callable[[], float]  # monotonic seconds
    check_base: Callable[[], bool]  # whether the base's weights are still those it was started with
    templates: ChatTemplates | None = None  # runs adapters' own chat templates; None: they are not used
    checked_for: str = ""  # version, weights, tokenizer and limits: of servers that are alike the same
    sources: Sources = field(default_factory=Sources)  # where adapters may be fetched from; nowhere by default
    follower: StoreFollower | None = None  # learns what other servers do to a shared store; None: there are none
