"""The few acts on a shared place that a store of many writers rests on, one method each.

A key is steps joined by `/`; the last step of a key has a dot, no other step has one. Whatever is put is seen whole or
not at all, by everybody from then on, and is durable on return. What has a tag may be replaced on condition that the
tag is still the one that was read: of several who try one does. Two kinds: `folder_bucket` and `object_bucket`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


class Oversize(Exception):  # noqa: N818  # a fact about what lies there
    """What lies there is larger than it may be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What lies under a key, and the tag that changes when it does."""

    content: bytes
    tag: str


class Bucket(Protocol):
    """All methods raise OSError, of which the number says why, as a disk's does. Safe from any thread."""

    def get(self, key: str, *, max_bytes: int) -> Found | None:
        """What lies there, None if nothing does; raises Oversize."""
        ...

    def put(self, key: str, content: bytes) -> None:
        """Put there, over what there is, by the only process that ever writes under this key."""
        ...

    def put_new(self, key: str, content: bytes) -> str | None:
        """Put where nothing is; gives the tag, None where something is already."""
        ...

    def replace(self, key: str, content: bytes, tag: str) -> str | None:
        """Put in the place of what has this tag; gives the new tag, None where something else is there, or nothing."""
        ...

    def tags(self, prefix: str) -> dict[str, str]:
        """The tag of every key below `prefix`, which ends in a slash."""
        ...

    def remove(self, key: str) -> None:
        """Remove what lies there, or all below a prefix that ends in a slash; nothing there is fine."""
        ...

    def require_room(self, num_bytes: int) -> None:
        """Raise OSError (ENOSPC) where so much would take what is to stay free."""
        ...

    def tidy(self) -> None:
        """Remove what the bucket itself left behind, as far as that is due."""
        ...
