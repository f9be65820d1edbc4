"""What goes between front and replicas: plain facts that pickle, and how errors and answers become such facts.

Knows neither ray nor HTTP. A request's times go as the sender's clock has them, with the time of sending; the receiver
translates (`clocks`). An error goes by its name and its attributes, as few exceptions can be made from their arguments.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from peft_serve import errors
from peft_serve.adapters.records import Profile, Summary
from peft_serve.adapters.vocabulary import Vocabulary
from peft_serve.core import AdapterId, Event, FinishEvent, Request
from peft_serve.engine.parts import BaseCard
from peft_serve.engine.snapshot import EngineSnapshot
from peft_serve.errors import Internal, ServeError


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """A grammar as a replica compiles it. `words` stands for the vocabulary: `await` gives its tokens."""

    source: str
    vocabulary: str  # digest of the tokens
    words: Any
    eos_ids: frozenset[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """A request on its way. `request` has no constraint: `spec` is that."""

    front: str  # whose clock it is
    sent_s: float
    request: Request
    spec: Spec | None = None
    homes: Mapping[AdapterId, str] = field(default_factory=dict)  # checkpoints of read-only folders, and their names


@dataclass(frozen=True, slots=True, kw_only=True)
class Accepted:
    """The first item of an answer: a replica has the request."""

    replica: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """A refusal as it travels."""

    name: str
    message: str
    attributes: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseFacts:
    """What the front must know of the base, and all replicas have in common."""

    card: BaseCard
    checked_for: str  # version, weights, tokenizer and limits: equal where replicas may stand for each other
    mark: str = ""  # of the settings that it was started with (`fitting`)


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What the gate of a replica found; an `adapters.findings.Inspection`."""

    id: AdapterId
    summary: Summary
    profile: Profile
    cues: tuple[int, ...]
    vocabulary: Vocabulary


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """How a replica is."""

    replica: str
    checked_for: str
    snapshot: EngineSnapshot
    num_open: int  # requests it has, whatever its engine does with them


def tell(error: Exception) -> Told:
    """An error as it travels; what is no refusal is the server's own fault and tells nothing more."""
    if not isinstance(error, ServeError):
        error = Internal("the request failed on the server's side; others were not affected")
    known = next(cls for cls in type(error).__mro__ if getattr(errors, cls.__name__, None) is cls)
    return Told(name=known.__name__, message=error.message, attributes=dict(vars(error)))


def heard(told: Told) -> ServeError:
    """The error again, of its own class where this version has that."""
    cls = getattr(errors, told.name, Internal)
    assert isinstance(cls, type)
    assert issubclass(cls, ServeError)
    error = cls.__new__(cls, told.message)
    Exception.__init__(error, told.message)
    vars(error).update(told.attributes)
    return error


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A `FinishEvent` whose error travels beside it."""

    event: FinishEvent
    told: Told


Item = Accepted | tuple[Event | Failure, ...]
"""What an answer consists of: first who answers, then the events of each step."""


def packed(events: Sequence[Event]) -> tuple[Event | Failure, ...]:
    """Events as they travel."""
    return tuple(map(_packed, events))


def _packed(event: Event) -> Event | Failure:
    if isinstance(event, FinishEvent) and event.error is not None:
        return Failure(event=replace(event, error=None), told=tell(event.error))
    return event


def unpacked(events: Sequence[Event | Failure]) -> tuple[Event, ...]:
    """Events as the engine gave them."""
    return tuple(replace(each.event, error=heard(each.told)) if isinstance(each, Failure) else each for each in events)
