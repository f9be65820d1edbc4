"""Small JSON documents that notice damage: a body and the sha256 of its canonical text.

A disk that flips a bit, or a file cut short, is found when the document is read, never believed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any


class SealError(ValueError):
    """The document is not what was written."""


def seal(body: Mapping[str, Any]) -> bytes:
    """The document that holds `body`, which must be JSON all through."""
    text = _canonical(body)
    return f'{{"sha256":"{_digest(text)}","body":{text}}}\n'.encode()


def unseal(document: bytes) -> dict[str, Any]:
    """The body of a document; raises SealError."""
    try:
        read = json.loads(document)
        body = read["body"]
        if isinstance(body, dict) and read["sha256"] == _digest(_canonical(body)):
            return body
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise SealError("not a sealed document") from error
    raise SealError("the seal does not match the body")


def _canonical(body: Mapping[str, Any]) -> str:
    return json.dumps(body, separators=(",", ":"), allow_nan=False)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
