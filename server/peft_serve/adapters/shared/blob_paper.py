"""The paper of a blob: where in a shared store its files are, or that they are gone. A frozen fact.

It is the one document about a blob that is ever replaced. Files are put under a fresh name that only the paper tells,
before it does; so files that a paper names are whole, and nobody writes to them again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from peft_serve.adapters.names import is_id
from peft_serve.core import AdapterId

FOLDER: Final = "blobs/sha256/"
_FILE: Final = "blob.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class BlobPaper:
    """`place` is the folder of the files, beside the paper; empty when they are gone, or about to go."""

    place: str = ""
    sizes: Mapping[str, int] = field(default_factory=dict)  # of every file, in bytes
    manifest: str = ""  # sealed, as `manifest.encode_manifest` writes it

    @property
    def is_gone(self) -> bool:
        return not self.place

    def to_json(self) -> dict[str, Any]:
        return {"place": self.place, "sizes": dict(self.sizes), "manifest": self.manifest}

    @classmethod
    def from_json(cls, body: Mapping[str, Any] | None) -> BlobPaper | None:
        """The paper that `to_json` gave; None for what is none."""
        if body is None:
            return None
        place, sizes, manifest = body.get("place"), body.get("sizes"), body.get("manifest")
        if not isinstance(place, str) or not isinstance(manifest, str) or not isinstance(sizes, dict):
            return None
        if "/" in place or "." in place or not all(type(size) is int and size >= 0 for size in sizes.values()):
            return None
        return cls(place=place, sizes=sizes, manifest=manifest)


def folder_of(adapter: AdapterId) -> str:
    """The prefix of all that is kept of a blob."""
    assert is_id(adapter), "only the digest of files names a blob"
    return f"{FOLDER}{adapter.removeprefix('sha256:')}/"


def paper_of(adapter: AdapterId) -> str:
    """The key of a blob's paper."""
    return f"{folder_of(adapter)}{_FILE}"


@dataclass(frozen=True, slots=True)
class Lying:
    """What a listing tells of one blob."""

    tag: str | None  # of its paper; None: there is none
    places: frozenset[str]


def lying(keys: Mapping[str, str]) -> dict[AdapterId, Lying]:
    """What lies under the keys of a listing, by blob."""
    tags: dict[AdapterId, str] = {}
    places: dict[AdapterId, set[str]] = {}
    for key, tag in keys.items():
        digest, _, rest = key.removeprefix(FOLDER).partition("/")
        adapter = AdapterId(f"sha256:{digest}")
        if not is_id(adapter):
            continue
        found = places.setdefault(adapter, set())
        if rest == _FILE:
            tags[adapter] = tag
        elif "/" in rest:
            found.add(rest.partition("/")[0])
    return {adapter: Lying(tags.get(adapter), frozenset(found)) for adapter, found in places.items()}
