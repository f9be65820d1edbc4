"""What an alias is: weighted targets, revision by revision. Frozen facts, kept in the record of the alias' name.

A revision never changes: pointing an alias elsewhere gives one more, and rolling back makes an earlier one current.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from peft_serve.adapters.sealed import SealError

MAX_TARGETS: Final = 16
MAX_REVISIONS: Final = 32
"""Revisions that are kept of an alias; the oldest goes first."""

MAX_TARGET_WEIGHT: Final = 1e6


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """An adapter, or one version of it, and its share beside the alias' other targets."""

    adapter: str
    version: int | None = None  # None: whatever the adapter's name stands for
    weight: float = 1.0

    @property
    def ref(self) -> str:
        """As a request would name it."""
        return self.adapter if self.version is None else f"{self.adapter}@{self.version}"

    def to_json(self) -> dict[str, Any]:
        return {"adapter": self.adapter, "version": self.version, "weight": self.weight}


@dataclass(frozen=True, slots=True, kw_only=True)
class Revision:
    """What an alias pointed to from `created` (RFC 3339, UTC) on."""

    number: int
    created: str
    targets: tuple[Target, ...]

    def target_at(self, point: float) -> Target:
        """The target at `point`, from 0 to below 1, of the whole weight; targets lie side by side in their order."""
        assert 0 <= point < 1
        left = point * math.fsum(target.weight for target in self.targets)
        weighty = [target for target in self.targets if target.weight > 0]
        for target in weighty:
            left -= target.weight
            if left < 0:
                return target
        return weighty[-1]

    def to_json(self) -> dict[str, Any]:
        return {
            "number": self.number,
            "created": self.created,
            "targets": [target.to_json() for target in self.targets],
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Revisions:
    """The revisions of an alias, oldest first, and the number of the current one."""

    current: int
    kept: tuple[Revision, ...]

    @property
    def now(self) -> Revision:
        found = self.numbered(self.current)
        assert found is not None, "the current revision is kept"
        return found

    def numbered(self, number: int) -> Revision | None:
        return next((each for each in self.kept if each.number == number), None)

    def followed_by(self, revision: Revision) -> Revisions:
        """With one more, which is current."""
        return Revisions(current=revision.number, kept=(*self.kept, revision)[-MAX_REVISIONS:])

    def rolled_back(self, number: int) -> Revisions:
        """With revision `number` current; it must be one that is kept."""
        assert self.numbered(number) is not None
        return replace(self, current=number)

    def to_json(self) -> dict[str, Any]:
        return {"current": self.current, "revisions": [each.to_json() for each in self.kept]}

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> Revisions:
        """What `to_json` gave; raises SealError, and KeyError, TypeError or AttributeError for another shape."""
        kept = tuple(
            Revision(
                number=each["number"],
                created=each["created"],
                targets=tuple(Target(**target) for target in each["targets"]),
            )
            for each in body["revisions"]
        )
        numbers = [each.number for each in kept]
        if numbers != sorted(set(numbers)) or body["current"] not in numbers:
            raise SealError("the revisions of an alias contradict themselves")
        if not all(are_targets(each.targets) for each in kept):
            raise SealError("the targets of an alias contradict themselves")
        return cls(current=body["current"], kept=kept)


def are_targets(targets: Sequence[Target]) -> bool:
    """Whether an alias may point to these: few enough, each once, weights in range and not all of them 0."""
    refs = {target.ref for target in targets}
    weights = [target.weight for target in targets]
    is_weighed = all(math.isfinite(weight) and 0 <= weight <= MAX_TARGET_WEIGHT for weight in weights)
    return 0 < len(targets) <= MAX_TARGETS and len(refs) == len(targets) and is_weighed and any(weights)
