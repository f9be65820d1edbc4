"""Small sealed documents in a bucket, that are replaced on condition of what they replace.

Each writing carries a mark of its own. So a change whose answer was lost on the way, and that is then told to have come
too late, is found to be there: whoever made it is told so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from peft_serve.adapters.sealed import SealError, seal, unseal
from peft_serve.adapters.shared.bucket import Bucket, Oversize

_MAX_BYTES: Final = 64 << 20
_ACT: Final = "act"


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """What lies under a key: its tag and its body, None where that is damaged."""

    tag: str
    body: Mapping[str, Any] | None


class Documents:
    """The documents of a bucket. `new_name` gives marks that no process gives again. Methods raise OSError."""

    def __init__(self, bucket: Bucket, new_name: Callable[[], str]) -> None:
        self._bucket = bucket
        self._new_name = new_name

    def read(self, key: str) -> Document | None:
        """What lies there; None if nothing does."""
        try:
            found = self._bucket.get(key, max_bytes=_MAX_BYTES)
            return None if found is None else Document(tag=found.tag, body=unseal(found.content))
        except SealError:
            assert found is not None, "nothing is not unsealed"
            return Document(tag=found.tag, body=None)
        except Oversize as error:
            raise OSError(f"{key} is too large to be a document") from error

    def swap(self, key: str, body: Mapping[str, Any], tag: str | None) -> str | None:
        """Put `body` in the place of what has `tag` (None: of nothing); the new tag, None if it is another by now."""
        act = self._new_name()
        content = seal({**body, _ACT: act})
        written = self._bucket.put_new(key, content) if tag is None else self._bucket.replace(key, content, tag)
        if written is not None:
            return written
        there = self.read(key)
        is_ours = there is not None and there.body is not None and there.body.get(_ACT) == act
        return there.tag if is_ours and there is not None else None
