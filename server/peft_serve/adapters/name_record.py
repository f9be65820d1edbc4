"""What a name stands for: its versions, which one is current, and the next number.

A record is a frozen fact; publishing, rolling back and deleting give a new one. It is what the store keeps in
`names/`. Numbers count up for ever: a deleted name keeps its counter, so `name@2` never means two things.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from peft_serve.adapters.alias_record import Revisions
from peft_serve.adapters.names import is_id
from peft_serve.adapters.sealed import SealError
from peft_serve.core import AdapterId


@dataclass(frozen=True, slots=True, kw_only=True)
class Numbered:
    """A version as the record knows it."""

    number: int
    id: AdapterId
    created: str  # RFC 3339, UTC
    source: str = ""  # where the server fetched it; empty: it was uploaded
    num_bytes: int = 0  # of its files; 0 where the record is from before they were counted


@dataclass(frozen=True, slots=True, kw_only=True)
class NameRecord:
    """A name's versions by ascending number. `current` is None when the name is deleted, and none is left."""

    name: str
    next_number: int = 1
    current: int | None = None
    versions: tuple[Numbered, ...] = ()
    owner: str = ""  # the tenant that published the first of the versions; empty: the operator
    alias: Revisions | None = None  # what it points to, of a name that has no versions and is an alias

    def published(
        self, adapter: AdapterId, created: str, source: str = "", *, owner: str = "", num_bytes: int = 0
    ) -> NameRecord:
        """The record with one more version, which is current. Who publishes the first one owns the name."""
        version = Numbered(number=self.next_number, id=adapter, created=created, source=source, num_bytes=num_bytes)
        return replace(
            self,
            owner=self.owner if self.versions else owner,
            next_number=self.next_number + 1,
            current=version.number,
            versions=(*self.versions, version),
        )

    def rolled_back(self, number: int) -> NameRecord:
        """The record with version `number` current; it must be one of `versions`."""
        assert self.numbered(number) is not None
        return replace(self, current=number)

    def deleted(self) -> NameRecord:
        """The tombstone: nothing but the counter."""
        return replace(self, current=None, versions=(), owner="", alias=None)

    def numbered(self, number: int | None) -> Numbered | None:
        """Version `number`, if it is there."""
        return next((v for v in self.versions if v.number == number), None)

    def identified(self, adapter: AdapterId) -> Numbered | None:
        """The newest version that is `adapter`, if one is."""
        return next((v for v in reversed(self.versions) if v.id == adapter), None)

    @property
    def current_version(self) -> Numbered | None:
        return self.numbered(self.current)

    @property
    def ids(self) -> frozenset[AdapterId]:
        return frozenset(v.id for v in self.versions)

    def to_json(self) -> dict[str, Any]:
        versions = [
            {"number": v.number, "id": v.id, "created": v.created}
            | ({"source": v.source} if v.source else {})
            | ({"bytes": v.num_bytes} if v.num_bytes else {})
            for v in self.versions
        ]
        body = {"name": self.name, "next": self.next_number, "current": self.current, "versions": versions}
        alias = {} if self.alias is None else {"alias": self.alias.to_json()}
        return body | ({"owner": self.owner} if self.owner else {}) | alias

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> NameRecord:
        """The record that `to_json` gave; raises SealError when the body is not a consistent one."""
        try:
            versions = tuple(
                Numbered(
                    number=v["number"],
                    id=AdapterId(v["id"]),
                    created=v["created"],
                    source=v.get("source", ""),
                    num_bytes=v.get("bytes", 0),
                )
                for v in body["versions"]
            )
            record = cls(
                name=body["name"],
                next_number=body["next"],
                current=body["current"],
                versions=versions,
                owner=body.get("owner", ""),
                alias=Revisions.from_json(body["alias"]) if "alias" in body else None,
            )
            numbers = [v.number for v in versions]
            consistent = (
                numbers == sorted(set(numbers))
                and all(0 < n < record.next_number for n in numbers)
                and all(is_id(v.id) and type(v.num_bytes) is int and v.num_bytes >= 0 for v in versions)
                and isinstance(record.owner, str)
                and (record.alias is None or (not numbers and record.alias.current < record.next_number))
                and ((record.current in numbers) if numbers else record.current is None)
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise SealError("not the record of a name") from error
        if not consistent:
            raise SealError("the record of a name contradicts itself")
        return record
