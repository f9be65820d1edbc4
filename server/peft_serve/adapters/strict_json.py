"""JSON from strangers: one object, UTF-8, no duplicate key, no NaN or Infinity, bounded size and depth.

Python's own parser takes all of these; every one of them has been used to say two things with one file.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from peft_serve.adapters.verdict import quoted
from peft_serve.errors import MalformedUpload

LFS_MAGIC = b"version https://git-lfs"
_BLANK = re.compile(r"[ \t\n\r]*")


class _RejectedError(ValueError):
    """A rule of ours that the parser's hooks found broken."""


def parse_object(content: bytes, *, name: str, max_bytes: int, max_depth: int = 12) -> dict[str, Any]:
    """The JSON object in `content`; raises `MalformedUpload` in the name of the file `name`."""
    value = _read(content, name, max_bytes, _decoder().decode)
    if not isinstance(value, dict):
        raise MalformedUpload(f"{name} must hold one JSON object; upload the file as it was saved")
    _check_contents(value, name, max_depth)
    return value


def parse_beginning(content: bytes, *, name: str, path: Sequence[str], max_bytes: int) -> dict[str, Any]:
    """The JSON object in `content` up to the member at `path`, without what follows it; raises `MalformedUpload`.

    For large files of which the rest is not read, and therefore not checked either. An object on the path that does
    not hold the next step is read to its end; how deep the values are nested, and their text, is for the caller.
    """
    value: dict[str, Any] = _read(content, name, max_bytes, lambda text: _members(text, 0, path, _decoder()))
    return value


def _members(text: str, at: int, path: Sequence[str], decoder: json.JSONDecoder) -> dict[str, Any]:
    """The members of the object at `at`, none after the first step of `path`; ValueError for what is no object."""
    pairs: list[tuple[str, Any]] = []
    at = _past(text, at, "{")
    if text.startswith("}", at):
        return {}
    while True:
        key, at = decoder.raw_decode(text, at)
        if not isinstance(key, str):
            raise ValueError("a key that is no text")
        at = _past(text, at, ":")
        if key == path[0]:
            inside = len(path) > 1 and text.startswith("{", at)
            value = _members(text, at, path[1:], decoder) if inside else decoder.raw_decode(text, at)[0]
            return _distinct([*pairs, (key, value)])
        value, at = decoder.raw_decode(text, at)
        pairs.append((key, value))
        at = _spaces(text, at)
        if text.startswith("}", at):
            return _distinct(pairs)
        at = _past(text, at, ",")


def _past(text: str, at: int, sign: str) -> int:
    """The place after a sign and the white space around it."""
    at = _spaces(text, at)
    if not text.startswith(sign, at):
        raise ValueError(f"no {sign}")
    return _spaces(text, at + 1)


def _spaces(text: str, at: int) -> int:
    blank = _BLANK.match(text, at)
    assert blank is not None, "it may match nothing, and always matches"
    return blank.end()


def _read(content: bytes, name: str, max_bytes: int, read: Callable[[str], Any]) -> Any:
    """What `read` makes of the text in `content`; every failure in the name of the file."""
    if len(content) > max_bytes:
        raise MalformedUpload(f"{name} has {len(content)} bytes; the limit is {max_bytes}; remove what is not needed")
    refuse_pointer(content, name)
    try:
        return read(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise MalformedUpload(f"{name} is not UTF-8 text; save it as UTF-8 JSON") from error
    except _RejectedError as error:
        raise MalformedUpload(f"{name}: {error}") from error
    except (ValueError, RecursionError) as error:
        raise MalformedUpload(f"{name} is not valid JSON; upload the file as it was saved") from error


def _decoder() -> json.JSONDecoder:
    return json.JSONDecoder(object_pairs_hook=_distinct, parse_constant=_no_constant, parse_float=_finite)


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
