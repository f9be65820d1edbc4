"""How long a request may wait: the header `X-Max-Wait`, in seconds, or what the operator set.

A request whose first token cannot come in time is refused at once, one that has waited in vain is ended: 429 either
way, so that its caller can ask elsewhere while there is time.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Final

from starlette.requests import Request as HttpRequest

from peft_serve.core import Request
from peft_serve.errors import InvalidParameter

HEADER: Final = "x-max-wait"
_MOST_S: Final = 86_400.0

WAIT_HEADER: Final = {
    "name": "X-Max-Wait",
    "in": "header",
    "required": False,
    "description": "seconds until the first token at most; a request that would wait longer is answered 429 at once",
    "schema": {"type": "number", "exclusiveMinimum": 0, "maximum": _MOST_S},
}


def max_wait_of(request: HttpRequest) -> float | None:
    """The seconds that the header gives; None without it. Raises InvalidParameter."""
    given = request.headers.get(HEADER)
    if given is None:
        return None
    try:
        seconds = float(given)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds <= _MOST_S:
        raise InvalidParameter(
            f"X-Max-Wait: {given[:32]!r}; send a number of seconds above 0 and up to {_MOST_S:.0f}", param=HEADER
        )
    return seconds


def until(request: Request, max_wait_s: float | None) -> Request:
    """The request with its deadline."""
    return request if max_wait_s is None else replace(request, deadline_s=request.arrival_s + max_wait_s)
