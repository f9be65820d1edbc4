"""Who answers a request: the base, a version of an adapter, or several of them combined. Facts and rules, no lookup.

A combination has one way of being asked: what its parts' profiles say is united, and where two of them differ the
request has to say which.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, field
from typing import Any, Final

from peft_serve.adapters.combined import Part, combined_id
from peft_serve.adapters.records import HeadFacts, Profile, Resolved
from peft_serve.api.naming import BASE_NAME
from peft_serve.core import BASE, AdapterId
from peft_serve.errors import InvalidParameter

COMBINED_METHOD: Final = "combined"
"""What metrics call the method of a combination, whatever it is made of."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedPart:
    """A version of an adapter, and how much of it."""

    resolved: Resolved
    weight: float = 1.0
    alias: str = ""  # by which it was asked for; empty: by its own name

    def describe(self) -> dict[str, Any]:
        r = self.resolved
        alias = {"alias": self.alias} if self.alias else {}
        return {"name": r.name, "version": r.number, "digest": r.id, "peft_type": r.peft_type} | alias


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """Who answers. No parts: the base."""

    name: str = BASE_NAME
    parts: tuple[ServedPart, ...] = field(default=())

    @property
    def method(self) -> str:
        if not self.parts:
            return "base"
        return self.parts[0].resolved.peft_type if len(self.parts) == 1 else COMBINED_METHOD

    @property
    def versions(self) -> str | None:
        """The version numbers of the parts; the base has none."""
        return "+".join(str(part.resolved.number) for part in self.parts) or None

    @property
    def aliases(self) -> str | None:
        """The aliases that led to the parts, if any did."""
        return "+".join(part.alias for part in self.parts if part.alias) or None

    @property
    def num_virtual_tokens(self) -> int:
        """Context positions in front of the prompt (decoder-only bases)."""
        return sum(part.resolved.num_virtual_tokens for part in self.parts)

    @property
    def head(self) -> HeadFacts | None:
        """The task head that the parts bring along; raises InvalidParameter for two."""
        heads = [part.resolved.head for part in self.parts if part.resolved.head is not None]
        if len(heads) > 1:
            raise InvalidParameter(
                f"adapter: {self.name} brings {len(heads)} task heads, and one input has one answer; name one of "
                "them, or send the names as `ensemble`",
                param="adapter",
            )
        return heads[0] if heads else None

    @property
    def ignores_segments(self) -> bool:
        """Whether it was trained without token types, as peft trains what answers questions."""
        return any(part.resolved.ignores_segments for part in self.parts)

    def adapter(self, task_id: int | None) -> AdapterId:
        """The id of what answers for a task; raises InvalidParameter for a task that there is not."""
        most = max((part.resolved.num_tasks for part in self.parts), default=1)
        if most == 1 and task_id:
            raise InvalidParameter(f"task_id: {self.name} holds one task; leave it out, or send 0", param="task_id")
        if not self.parts:
            return BASE
        return combined_id([self._part(part, task_id) for part in self.parts])

    @staticmethod
    def _part(part: ServedPart, task_id: int | None) -> Part:
        resolved = part.resolved
        if resolved.num_tasks == 1:
            return Part(id=resolved.id, weight=part.weight)
        if task_id is None or task_id >= resolved.num_tasks:
            asked = "the request names none" if task_id is None else f"{task_id} is none of them"
            raise InvalidParameter(
                f"task_id: adapter '{resolved.name}' holds {resolved.num_tasks} tasks and {asked}; "
                f"send task_id 0 to {resolved.num_tasks - 1}",
                param="task_id",
            )
        return Part(id=resolved.id, weight=part.weight, task=task_id)

    def profile(self, said: Container[str]) -> Profile:
        """How it wants to be asked, where the request does not say; `said` are the parameters that it does say.

        Raises InvalidParameter where two parts differ.
        """
        profiles = [part.resolved.profile for part in self.parts]
        if len(profiles) < 2:
            return profiles[0] if profiles else Profile()
        parameters: dict[str, Any] = {}
        for profile in profiles:
            for name, value in profile.parameters.items():
                if name in parameters and parameters[name] != value and name not in said:
                    raise self._differ(name)
                parameters[name] = value
        labelled = [part.resolved.profile for part in self.parts if part.resolved.head is not None]
        return Profile(
            template=self._agreed("template", [profile.template for profile in profiles], said),
            choices=self._agreed("choices", [profile.choices for profile in profiles], said),
            parameters=parameters,
            labels=labelled[0].labels if labelled else None,
        )

    def _agreed(self, name: str, values: list[Any], said: Container[str]) -> Any:
        there = [value for value in values if value is not None]
        if name not in said and any(value != there[0] for value in there):
            raise self._differ(name)
        return there[0] if there else None

    def _differ(self, name: str) -> InvalidParameter:
        return InvalidParameter(
            f"{name}: the adapters of {self.name} bring different ones; say in the request which is meant", param=name
        )

    def describe(self) -> dict[str, Any]:
        """The `adapter` member of a native answer."""
        if not self.parts:
            return {"name": BASE_NAME, "version": None, "digest": None, "peft_type": None}
        if len(self.parts) == 1 and self.parts[0].weight == 1.0:
            return self.parts[0].describe()
        return {
            "name": self.name,
            "version": None,
            "digest": None,
            "peft_type": "+".join(part.resolved.peft_type for part in self.parts),
            "parts": [part.describe() | {"weight": part.weight} for part in self.parts],
        }
