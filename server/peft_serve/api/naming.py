"""Which adapter, and which of its tasks, a request names: query, header, body and OpenAI's `model`, in this order.

Places that name different adapters contradict each other and are refused, so the order decides only who is
read first. Knows no catalog: whether the name exists is found out later.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Final

from starlette.requests import Request

from peft_serve.adapters.names import shown
from peft_serve.api.json_body import printable
from peft_serve.errors import AdapterConflict, BadRequest, InvalidParameter

BASE_NAME: Final = "base"
FIELDS: Final = ("adapter", "task_id")
"""What a query may name."""
_ALIKE: Final = 0.75
MODEL_ALIASES: Final = frozenset({"base", "dummy", "tgi"})
"""Words that clients put into `model` when they have no name to give."""


@dataclass(frozen=True, slots=True)
class Mention:
    """A place of the request, and the adapter named there."""

    place: str
    name: str


def mentions_of(request: Request) -> tuple[Mention, ...]:
    """What the address and the headers of a request name. Raises InvalidParameter for a name that is nearly one.

    Other fields of a query pass: gateways add their own. A mistyped one would be answered by the base.
    """
    for field in dict.fromkeys(request.query_params):
        meant = get_close_matches(field.lower(), FIELDS, n=1, cutoff=_ALIKE)
        if meant and field not in FIELDS:
            raise InvalidParameter(f"query {printable(field)}: did you mean {meant[0]}?", param=printable(field))
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
    """The one adapter (or expression) all places name, `base` if none does; raises AdapterConflict if they disagree."""
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
    return first.name


def agreed_task(request: Request, said: int | None) -> dict[str, int]:
    """`task_id` as a parameter, from the query or the body; empty if neither names one.

    Raises InvalidParameter for what is no number, and BadRequest if they disagree.
    """
    tasks = [] if said is None else [said]
    for text in request.query_params.getlist("task_id"):
        if not (text.isascii() and text.isdigit() and len(text) < 10):
            raise InvalidParameter("task_id: a number from 0 on", param="task_id")
        tasks.append(int(text))
    if len(set(tasks)) > 1:
        raise BadRequest("task_id: the query and the body name different tasks; name one", param="task_id")
    return {"task_id": tasks[0]} if tasks else {}


def named_adapters(
    request: Request,
    mentioned: Iterable[Mention],
    own: str | list[str | None] | None,
    model: str | None,
    *,
    num_inputs: int,
    base_name: str,
) -> list[str]:
    """The adapter of each input. `own` is the body's `adapter`, which may be a list; `mentioned` its other places."""
    shared = (*mentions_of(request), *mentioned)
    last = model_mention(model, base_name)
    if not isinstance(own, list):
        return [agreed_name((*shared, Mention("adapter", own or ""), *last), base_name)] * num_inputs
    if len(own) != num_inputs:
        raise InvalidParameter(f"adapter: {len(own)} names for {num_inputs} inputs; give one for each", param="adapter")
    # In a list a null is a choice: this input is for the base.
    return [agreed_name((*shared, Mention("adapter", name or "base"), *last), base_name) for name in own]


def named_members(
    request: Request, mentioned: Iterable[Mention], own: str | list[str | None] | None, *lists: list[str] | None
) -> list[str]:
    """The members of the ensemble that a body names in one of `lists`; empty if it names none."""
    named = [members for members in lists if members]
    if not named:
        return []
    others = [m.place for m in (*mentions_of(request), *mentioned) if m.name.strip()] + (["adapter"] if own else [])
    if others or any(members != named[0] for members in named):
        place = others[0] if others else "parameters.ensemble"
        raise AdapterConflict(
            f"ensemble: {place} names adapters as well; name all who answer in ensemble", param="ensemble"
        )
    if len(set(named[0])) < len(named[0]):
        raise InvalidParameter("ensemble: names an adapter twice; each member has one voice", param="ensemble")
    return named[0]
