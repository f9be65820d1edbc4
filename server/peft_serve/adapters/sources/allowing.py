"""Which sources the operator allows: patterns given at start, and nothing without one.

A pattern allows what it names and everything beneath it. `*` and `?` stand for characters of one step of the hub's and
the object stores' names; a folder of this machine is named as it is. Knows names alone: whether a path leads out of
its folder by a link is found when it is opened.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Final

from peft_serve.adapters.sources.locator import SCHEMES, Kind, Locator, parse_locator
from peft_serve.errors import InvalidParameter

_EXAMPLES: Final = "hf://org/*, s3://bucket/folder or file:/srv/adapters"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pattern:
    kind: Kind
    steps: tuple[str, ...]
    revision: str | None = None  # None: any

    def matches(self, locator: Locator) -> bool:
        if locator.kind is not self.kind or len(locator.steps) < len(self.steps):
            return False
        if self.revision is not None and not fnmatchcase(locator.revision or "", self.revision):
            return False
        if self.kind is Kind.FILE:
            return locator.steps[: len(self.steps)] == self.steps
        return all(fnmatchcase(step, wanted) for step, wanted in zip(locator.steps, self.steps, strict=False))


class AllowedSources:
    """The operator's patterns; none: nothing is allowed. Raises ValueError for what is no pattern."""

    def __init__(self, patterns: Sequence[str] = ()) -> None:
        self._patterns = tuple(_parse(pattern) for pattern in patterns)

    @property
    def kinds(self) -> frozenset[Kind]:
        """The kinds that anything is allowed of."""
        return frozenset(pattern.kind for pattern in self._patterns)

    def allows(self, locator: Locator) -> bool:
        return any(pattern.matches(locator) for pattern in self._patterns)

    def root_of(self, locator: Locator) -> Path:
        """The allowed folder that a `file:` source, which is allowed, is beneath."""
        found = next(pattern for pattern in self._patterns if pattern.matches(locator))
        return Path("/", *found.steps)


def _parse(text: str) -> _Pattern:
    scheme, _, rest = text.partition("://")
    if text.startswith("file:"):
        try:
            return _Pattern(kind=Kind.FILE, steps=parse_locator(text).steps)
        except InvalidParameter as error:
            raise ValueError(f"--allow-source: {error.message}") from error
    if scheme not in SCHEMES:
        raise ValueError(f"--allow-source {text!r}: write {_EXAMPLES}")
    revision = None
    if scheme == Kind.HF:
        rest, at, revision_text = rest.partition("@")
        revision = revision_text if at else None
        if revision is not None and ("/" in revision or not revision):
            raise ValueError(f"--allow-source {text!r}: nothing stands behind a revision; a slash in it is %2F")
        revision = None if revision is None else revision.replace("%2F", "/")
    steps = tuple(rest.removesuffix("/").split("/"))
    if not all(steps) or ".." in steps or "**" in steps:
        raise ValueError(f"--allow-source {text!r}: write {_EXAMPLES}; * stands for one step and all beneath it")
    return _Pattern(kind=Kind(scheme), steps=steps, revision=revision)
