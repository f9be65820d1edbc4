"""Adapter names: the rule, the ways to refer to a version, expressions of several, and a name's spelling on a disk.

A name comes from outside and never becomes a path as it stands: `file_stem` spells it so that two names that
differ only in case stay two files where the file system does not tell case apart. Which names exist is the
catalog's business.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Final

from peft_serve.adapters.combined import MAX_PARTS, MAX_WEIGHT
from peft_serve.core import AdapterId
from peft_serve.errors import InvalidParameter, UnknownAdapter

RESERVED: Final = frozenset({"base", "dummy", "tgi"})
"""Names by which clients mean the base model; refused in any case."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_ID = re.compile(r"sha256:[0-9a-f]{64}")
_NUMBER = re.compile(r"0|[1-9][0-9]{0,8}")
_TERM = re.compile(r"(?P<ref>[^+:@]*(?:@sha256:[0-9a-f]{64}|@[^+:]*)?)(?::(?P<weight>[^+:]*))?")
_WEIGHT = re.compile(r"-?(?:\d{1,9}(?:\.\d{0,9})?|\.\d{1,9})")
_STEM = re.compile(r"(?:[a-z0-9._-]|=[a-z])+")
_MAX_SHOWN = 80


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterRef:
    """What a caller named: a name, and at most one of a version number and an id."""

    name: str
    number: int | None = None
    id: AdapterId | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Term:
    """One adapter of an expression, as `parse_ref` reads it, and how much of it."""

    ref: str
    weight: float = 1.0


def is_name(text: str) -> bool:
    """Whether `text` follows the rule for names. Reserved names do."""
    return _NAME.fullmatch(text) is not None


def is_id(text: str) -> bool:
    """Whether `text` is spelled like the id of an adapter: `sha256:` and 64 lower-case hex digits."""
    return _ID.fullmatch(text) is not None


def shown(text: str) -> str:
    """A caller's text, fit for a message: printable ASCII in quotes, at most 80 characters."""
    return ascii(text if len(text) <= _MAX_SHOWN else text[: _MAX_SHOWN - 3] + "...")


def check_name(name: str, *, base_name: str) -> str:
    """`name`, when an adapter may be published under it; raises InvalidParameter."""
    if not is_name(name):
        raise InvalidParameter(
            f"adapter name {shown(name)}: a name is 1 to 64 letters, digits, '.', '_' or '-', "
            "and begins with a letter or a digit",
            param="name",
        )
    if name.lower() in RESERVED or name.lower() == base_name.lower():
        raise InvalidParameter(
            f"adapter name {shown(name)} is reserved: it means the base model; choose another name",
            param="name",
        )
    return name


def unknown(ref: str) -> UnknownAdapter:
    """The refusal of a name or a version that does not exist."""
    return UnknownAdapter(f"adapter {shown(ref)} does not exist; GET /adapters lists the ones that do", param="adapter")


def parse_ref(text: str) -> AdapterRef:
    """Read `name`, `name@3` or `name@sha256:<64 hex>`; raises UnknownAdapter for anything else.

    A text that cannot be the name of an adapter is answered like one that is not: with 404.
    """
    name, at, pin = text.partition("@")
    if not is_name(name):
        raise unknown(text)
    if not at:
        return AdapterRef(name=name)
    if _NUMBER.fullmatch(pin):
        return AdapterRef(name=name, number=int(pin))
    if is_id(pin):
        return AdapterRef(name=name, id=AdapterId(pin))
    raise unknown(text)


def parse_expression(text: str) -> tuple[Term, ...]:
    """Read `a`, `a+b`, `a:0.7+b@2:0.3`: adapters that act together. What each names is not looked at.

    Raises InvalidParameter for what is no expression; a text without `+` and without a weight is one term as it is.
    """
    parts = text.split("+")
    if len(parts) > 1 and not all(part.strip() for part in parts):
        raise InvalidParameter(
            f"adapter {shown(text)}: there is nothing beside a '+'; write a+b, and %2B for the plus in an address",
            param="adapter",
        )
    if len(parts) > MAX_PARTS:
        raise InvalidParameter(
            f"adapter: {len(parts)} adapters in one request; this server combines at most {MAX_PARTS}", param="adapter"
        )
    terms = tuple(_term(part, text) for part in parts)
    if len({term.ref for term in terms}) < len(terms):
        raise InvalidParameter(
            f"adapter {shown(text)}: names an adapter twice; name it once, with a weight", param="adapter"
        )
    return terms


def _term(part: str, text: str) -> Term:
    found = _TERM.fullmatch(part)
    if "@sha256:" in part and (found is None or "@sha256:" not in found["ref"]):
        raise InvalidParameter(
            f"adapter {shown(text)}: a digest is written whole, sha256: and 64 hexadecimal digits", param="adapter"
        )
    if found is None or found["weight"] is None:
        return Term(ref=part)  # a name that cannot be is refused like one that does not exist
    weight = float(found["weight"]) if _WEIGHT.fullmatch(found["weight"]) else math.nan
    if not 0 < abs(weight) <= MAX_WEIGHT:
        raise InvalidParameter(
            f"adapter {shown(text)}: a weight is a number up to {MAX_WEIGHT:g} that is not 0, behind a colon, "
            "as in a:0.7+b:0.3",
            param="adapter",
        )
    return Term(ref=found["ref"], weight=weight)


def file_stem(name: str) -> str:
    """A file name for `name`, without its ending: capitals become `=` and the small letter."""
    assert is_name(name), "only a checked name becomes a file name"
    return "".join(f"={c.lower()}" if c.isupper() else c for c in name)


def name_of_stem(stem: str) -> str | None:
    """The name that `file_stem` spells as `stem`; None if there is none."""
    if not _STEM.fullmatch(stem):
        return None
    name = re.sub(r"=([a-z])", lambda match: match[1].upper(), stem)
    return name if is_name(name) else None
