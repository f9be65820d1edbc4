"""Ids of what is made of checkpoints: several at once, weighted, or one of the tasks that a checkpoint holds.

The id is the text of its parts in the order named, `sha256:..*0.7+sha256:..#2`, so that equal requests share one
compiled adapter and everything below the HTTP floor goes on knowing one id for each request. A checkpoint as it is
keeps its own id. Knows no tensor and no name.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from peft_serve.core import AdapterId

MAX_PARTS: Final = 8
MAX_WEIGHT: Final = 100.0

_PART = re.compile(r"(?P<id>sha256:[0-9a-f]{64})(?:#(?P<task>\d+))?(?:\*(?P<weight>-?\d+(?:\.\d+)?(?:e-?\d+)?))?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One checkpoint of a combination: how much of it, and which of its tasks."""

    id: AdapterId
    weight: float = 1.0
    task: int | None = None  # None: it holds one task only

    @property
    def is_plain(self) -> bool:
        """Whether this is the checkpoint as it is."""
        return self.weight == 1.0 and self.task is None


def combined_id(parts: Sequence[Part]) -> AdapterId:
    """The id of the parts together; of one checkpoint as it is, its own."""
    assert 0 < len(parts) <= MAX_PARTS, "a combination has one part at least, and so many at most"
    return AdapterId("+".join(_text(part) for part in parts))


def is_combined(adapter: AdapterId) -> bool:
    """Whether the id is one that `combined_id` made of something else than a checkpoint as it is."""
    return any(mark in adapter for mark in "+*#")


def parts_of(adapter: AdapterId) -> tuple[Part, ...]:
    """What `combined_id` made the id of. Raises ValueError for a text that is no such id."""
    return tuple(_part(text) for text in adapter.split("+"))


def _text(part: Part) -> str:
    task = "" if part.task is None else f"#{part.task}"
    weight = "" if part.weight == 1.0 else f"*{part.weight!r}"
    return f"{part.id}{task}{weight}"


def _part(text: str) -> Part:
    found = _PART.fullmatch(text)
    if found is None:
        raise ValueError(f"{text[:100]!r} is not a part of an adapter id")
    task, weight = found["task"], found["weight"]
    return Part(
        id=AdapterId(found["id"]),
        weight=1.0 if weight is None else float(weight),
        task=None if task is None else int(task),
    )
