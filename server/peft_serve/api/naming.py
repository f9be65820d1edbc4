"""Which adapter a request names: query, header, body and OpenAI's `model`, in this order.

Places that name different adapters contradict each other and are refused, so the order decides only who is
read first. Knows no catalog: whether the name exists is found out later.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from starlette.requests import Request

from peft_serve.adapters.names import shown
from peft_serve.errors import AdapterConflict, InvalidParameter

BASE_NAME: Final = "base"
MODEL_ALIASES: Final = frozenset({"base", "dummy", "tgi"})
"""Words that clients put into `model` when they have no name to give."""


@dataclass(frozen=True, slots=True)
class Mention:
    """A place of the request, and the adapter named there."""

    place: str
    name: str


def mentions_of(request: Request) -> tuple[Mention, ...]:
    """What the address and the headers of a request name."""
    # A plus sign in a query reads as a space; names hold no spaces, so a space was a plus sign.
    query = [Mention("query adapter", v.replace(" ", "+")) for v in request.query_params.getlist("adapter")]
    header = [Mention("header X-Adapter", v) for v in request.headers.getlist("x-adapter")]
    return (*query, *header)


def model_mention(model: str | None, base_name: str) -> tuple[Mention, ...]:
    """What OpenAI's `model` names: nothing if it is the base."""
    if not model or model in MODEL_ALIASES or model == base_name:
        return ()
    return (Mention("model", model),)


def agreed_name(mentions: Iterable[Mention], base_name: str) -> str:
    """The one adapter all places name, `base` if none does; raises AdapterConflict if they disagree."""
    named = [Mention(m.place, BASE_NAME if m.name == base_name else m.name) for m in mentions if m.name.strip()]
    if not named:
        return BASE_NAME
    first = named[0]
    for other in named[1:]:
        if other.name != first.name:
            raise AdapterConflict(
                f"adapter: {first.place} names {shown(first.name)} and {other.place} names "
                f"{shown(other.name)}; name one adapter in one place",
                param="adapter",
            )
    if "+" in first.name:
        raise InvalidParameter(
            f"adapter {shown(first.name)}: this server does not combine adapters; name one of them",
            param="adapter",
        )
    return first.name
