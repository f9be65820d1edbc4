"""One module, several names: the body of a model is reached through a prefix in some classes and bare in others.

`BertForSequenceClassification` has `bert.encoder...`, `BertModel` has `encoder...`; a checkpoint may say either,
whichever of them is served.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from peft_serve.adapters.base import Base

_ALIASES: Final = ("transformer",)
"""`LlamaForQuestionAnswering` and its like keep the body here, and all their other classes under `model`."""


def spellings(key: str, base: Base) -> Iterator[str]:
    """The key as it is, and as the base says it: with its prefix of the body, or without any."""
    own = f"{base.body_prefix}." if base.body_prefix else ""
    is_bare = not any(path.startswith(own) for path in base.sites)
    added = "" if is_bare else own
    yield key
    for prefix in (own, *(f"{alias}." for alias in _ALIASES)):
        if prefix and key.startswith(prefix) and (is_bare or prefix != own):
            yield added + key.removeprefix(prefix)
    if added:
        yield added + key


def site_path(path: str, base: Base) -> str | None:
    """The site of the base that a path means, however it is spelt."""
    return next((spelt for spelt in spellings(path, base) if spelt in base.sites), None)
