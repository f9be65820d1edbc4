"""Which of an alias' targets a call takes: by the call's session, or by chance.

Calls of one session (the header `X-Session-Id`, else the body's `user`) fall on one point of an alias' weights for
ever: they keep their target as long as the weights leave the point where it is. Others fall anywhere.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any, Final

from starlette.requests import Request

from peft_serve.errors import InvalidParameter

HEADER: Final = "x-session-id"
MAX_SESSION_CHARS: Final = 256
_BITS: Final = 53  # a float holds so many exactly
_WHOLE: Final = float(1 << _BITS)

SESSION_HEADER: Final = {
    "name": "X-Session-Id",
    "in": "header",
    "required": False,
    "description": "calls with the same value get the same target of an alias; without it the body's `user` does this",
    "schema": {"type": "string", "maxLength": MAX_SESSION_CHARS},
}


def note_user(request: Request, body: dict[str, Any]) -> None:
    """Remember who the body says that it asks for."""
    user = body.get("user")
    request.state.user = user[:MAX_SESSION_CHARS] if isinstance(user, str) else ""


def session_of(request: Request) -> str:
    """What the calls of a session have in common; empty: nothing. Raises InvalidParameter."""
    given = request.headers.get(HEADER, "")
    if len(given) > MAX_SESSION_CHARS:
        raise InvalidParameter(f"{HEADER}: at most {MAX_SESSION_CHARS} characters", param=HEADER)
    return given or getattr(request.state, "user", "")


class Draws:
    """Where one call falls in the weights of each alias that it names. `draw_bits(n)` gives n random bits."""

    def __init__(self, session: str, draw_bits: Callable[[int], int]) -> None:
        self._session = session
        self._draw_bits = draw_bits

    def point(self, alias: str) -> float:
        """From 0 to below 1. Sessions fall differently in each alias, so that trials do not follow one another."""
        if not self._session:
            return self._draw_bits(_BITS) / _WHOLE
        digest = hashlib.sha256(f"{alias}\0{self._session}".encode(errors="replace")).digest()
        return (int.from_bytes(digest[:8], "big") >> (64 - _BITS)) / _WHOLE
