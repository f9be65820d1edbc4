"""JSON from a caller: read strictly, with errors that are bounded and named by field.

Owns parsing and the sorting of fields into known, inert and refused. Which fields a route has is `bodies`'
and `fields`' business.
"""

from __future__ import annotations

import json
import math
from codecs import BOM_UTF8
from collections import Counter
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from itertools import islice
from typing import Any, Final, NoReturn, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import Request

from peft_serve.adapters.names import shown
from peft_serve.api.fields import FieldRules
from peft_serve.api.problems import MAX_ERRORS, FieldsInvalid
from peft_serve.api.splitting import note_user
from peft_serve.errors import InvalidParameter, Refusal

B = TypeVar("B", bound=BaseModel)

_LONGEST_NAME: Final = 64
_LONGEST_NUMBER: Final = 400  # digits; reading one takes the square of that, and Python stops at 4,300


async def read_object(request: Request) -> dict[str, Any]:
    """The request's body as a JSON object; raises InvalidParameter."""
    content = b"".join([chunk async for chunk in request.stream()])
    body = parse_object(content)
    note_user(request, body)
    return body


def parse_object(content: bytes) -> dict[str, Any]:
    """`content` as a JSON object of finite numbers and well-formed text; raises InvalidParameter."""
    try:
        value = _read(content)
    except _NotTakenError as error:
        raise InvalidParameter(f"body: {error}", param="body") from error
    if not isinstance(value, dict):
        raise InvalidParameter("body: a JSON object is needed", param="body")
    return value


def _read(content: bytes) -> Any:
    if not content.strip():
        raise _NotTakenError("there is none; send a JSON object")
    if content.startswith(BOM_UTF8):
        raise _NotTakenError("a byte order mark (BOM) stands before the JSON; send UTF-8 without one")
    try:
        value = json.loads(
            content.decode(),
            parse_constant=_refuse_constant,
            parse_float=_finite,
            parse_int=_whole,
            object_pairs_hook=_object,
        )
        if b"\\u" in content:
            # Half of a surrogate pair can be written in JSON, and cannot be encoded again.
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        raise _NotTakenError(f"byte {error.start} is not UTF-8; encode the JSON as UTF-8") from error
    except UnicodeEncodeError as error:
        raise _NotTakenError(
            "a \\ud800 to \\udfff escape stands alone; a character beyond \\uffff takes a pair of them, or is written "
            "as it is"
        ) from error
    except json.JSONDecodeError as error:
        raise _NotTakenError(
            f"not valid JSON from line {error.lineno}, column {error.colno}; send an object"
        ) from error
    except RecursionError as error:
        raise _NotTakenError("lists and objects are nested too deeply; no field needs that") from error
    return value


class _NotTakenError(ValueError):
    """JSON with two meanings, or none; its message is fit to be shown."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Of a field that is said twice, whoever stands before this server may have read the other one."""
    made = dict(pairs)
    if len(made) < len(pairs):
        twice = next(name for name, times in Counter(name for name, _ in pairs).items() if times > 1)
        raise _NotTakenError(f"an object says the field {printable(twice)} twice; send it once")
    return made


def _refuse_constant(name: str) -> NoReturn:
    raise _NotTakenError(f"{name} is not a JSON number; send a finite one")


def _whole(text: str) -> int:
    if len(text) > _LONGEST_NUMBER:
        raise _NotTakenError(f"a number has more than {_LONGEST_NUMBER} digits; no field takes that")
    return int(text)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise _NotTakenError("a number is too large; send a finite one")
    return value


def validated(model: type[B], fields: Mapping[str, Any], rules: FieldRules, *, path: str = "") -> B:
    """`fields` as a `model`; raises FieldsInvalid.

    Explicit nulls are absent (unless the rules keep them), inert values are dropped, and what this server does
    not do is refused by name, so that nothing asked for is passed over in silence.
    """
    kept: dict[str, Any] = {}
    errors: list[Refusal] = []
    known = model.model_fields
    num_errors = 0
    for name, value in fields.items():
        if value is None and name not in rules.nullable:
            continue
        reason = _refusal(name, value, rules, is_known=name in known)
        if reason is not None:
            num_errors += 1
            if len(errors) < MAX_ERRORS:
                errors.append(Refusal(path + printable(name), reason if reason else _unknown(name, known)))
        elif name in known:
            kept[name] = value
    if errors:
        raise FieldsInvalid(errors, num_errors=num_errors)
    try:
        return model.model_validate(kept)
    except ValidationError as error:
        raise _fields_invalid(error, path) from error


def printable(name: str) -> str:
    """A caller's own field name, fit for a message: as it is if it is plain, else quoted."""
    return name if name.isascii() and name.isidentifier() and len(name) <= _LONGEST_NAME else shown(name)


def _refusal(name: str, value: Any, rules: FieldRules, *, is_known: bool) -> str | None:
    """Why a field is not taken, empty where the route does not know it; None: it is taken, or passed over."""
    if name in rules.refused:
        refused = rules.refused[name]
        if any(type(value) is type(inert) and value == inert for inert in refused.inert):
            return None
        return refused.reason
    if is_known or name in rules.ignored:
        return None
    return ""


def _unknown(name: str, known: Iterable[str]) -> str:
    close = get_close_matches(name[:_LONGEST_NAME].lower(), known, n=1, cutoff=0.7)
    return f"this route has no such field; {f'did you mean {close[0]}?' if close else '/docs lists the ones it has'}"


def _fields_invalid(error: ValidationError, path: str) -> FieldsInvalid:
    found: dict[str, str] = {}
    # A field that may be one of several types fails once for each; the first word is enough.
    for each in islice(error.errors(include_url=False, include_context=False, include_input=False), 100):
        place = path + ".".join(_place(each["loc"]))
        found.setdefault(place or "body", each["msg"].removeprefix("Value error, "))
    return FieldsInvalid([Refusal(place, reason) for place, reason in found.items()])


def _place(loc: tuple[int | str, ...]) -> list[str]:
    """The steps of a location that are the caller's own: not the names of the types that were tried."""
    steps = [step for step in loc if isinstance(step, int) or step.isidentifier()]
    types = {"str", "int", "bool", "float", "dict", "list"}
    return [str(step) for i, step in enumerate(steps) if i == 0 or step not in types]
