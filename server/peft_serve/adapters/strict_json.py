"""JSON from strangers: one object, UTF-8, no duplicate key, no NaN or Infinity, bounded size and depth.

Python's own parser takes all of these; every one of them has been used to say two things with one file.
"""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn

from peft_serve.adapters.verdict import quoted
from peft_serve.errors import MalformedUpload

LFS_MAGIC = b"version https://git-lfs"


class _RejectedError(ValueError):
    """A rule of ours that the parser's hooks found broken."""


def parse_object(content: bytes, *, name: str, max_bytes: int, max_depth: int = 12) -> dict[str, Any]:
    """The JSON object in `content`; raises `MalformedUpload` in the name of the file `name`."""
    if len(content) > max_bytes:
        raise MalformedUpload(f"{name} has {len(content)} bytes; the limit is {max_bytes}; remove what is not needed")
    refuse_pointer(content, name)
    try:
        value = json.loads(
            content.decode("utf-8"),
            object_pairs_hook=_distinct,
            parse_constant=_no_constant,
            parse_float=_finite,
        )
    except UnicodeDecodeError as error:
        raise MalformedUpload(f"{name} is not UTF-8 text; save it as UTF-8 JSON") from error
    except _RejectedError as error:
        raise MalformedUpload(f"{name}: {error}") from error
    except (ValueError, RecursionError) as error:
        raise MalformedUpload(f"{name} is not valid JSON; upload the file as it was saved") from error
    if not isinstance(value, dict):
        raise MalformedUpload(f"{name} must hold one JSON object; upload the file as it was saved")
    _check_contents(value, name, max_depth)
    return value


def refuse_pointer(content: bytes, name: str) -> None:
    """Refuse a git-lfs pointer, which stands for the file and is not it."""
    if content.startswith(LFS_MAGIC):
        raise MalformedUpload(f"{name} is a git-lfs pointer, not the file; run `git lfs pull` and upload again")


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise _RejectedError(f"key {quoted(twice)} occurs twice; keep one of them")
    return result


def _no_constant(text: str) -> NoReturn:
    raise _RejectedError(f"{text} is not a JSON number; write a finite one")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise _RejectedError(f"{quoted(text)} is beyond a 64-bit float; write a finite number")
    return value


def _check_contents(value: object, name: str, max_depth: int) -> None:
    level = [value]
    for _ in range(max_depth):
        inner: list[object] = []
        for item in level:
            if isinstance(item, dict):
                inner.extend(item)
                inner.extend(item.values())
            elif isinstance(item, list):
                inner.extend(item)
            elif isinstance(item, str) and not _is_text(item):
                raise MalformedUpload(f"{name} holds half of a surrogate pair; write the character itself")
        if not inner:
            return
        level = inner
    raise MalformedUpload(f"{name} is nested deeper than {max_depth} levels; no checkpoint needs that")


def _is_text(text: str) -> bool:
    """A lone surrogate is legal in JSON's escapes and in no encoding: it would fail wherever it is written."""
    return text.isascii() or not any("\ud800" <= char <= "\udfff" for char in text)
