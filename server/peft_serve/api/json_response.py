"""JSON as it is sent: compact, any text as it is, and no number that is not finite."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from json.encoder import encode_basestring
from typing import Any, Final

from starlette.responses import Response

compact_json: Final = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode
"""A value as JSON text. One encoder for all: `json.dumps` makes one for each call that has options."""

json_text: Callable[[str], str] = encode_basestring
"""A string as `compact_json` writes it."""


def json_response(content: Any, *, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """`content` as compact JSON in UTF-8."""
    body = compact_json(content).encode()
    return Response(body, status_code=status, headers=dict(headers or {}), media_type="application/json")
