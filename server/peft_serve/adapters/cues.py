"""Cues: token ids without which a prompt shows nothing of an adapter.

An adapter may act on some tokens only: rows of the embedding that it trains, or what follows the ids that it starts
at (aLoRA). Whoever tries it out puts these into the prompt. Knows no prompt and no tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Final

from peft_serve.adapters.config_schema import Config
from peft_serve.adapters.registry import Method, SiteMethod

MAX_TRAINED: Final = 32
_FIELDS: Final = ("token_indices", "trainable_token_indices")


def cues_of(method: Method, config: Config) -> tuple[int, ...]:
    """The first few ids whose rows it trains, then the ids that it starts at, in the order in which a prompt has them.

    As the config says them: an id may be beyond the base's vocabulary.
    """
    start = method.start(config) if isinstance(method, SiteMethod) else ()
    return (*islice(_trained(config), MAX_TRAINED), *start)


def _trained(config: Config) -> Iterator[int]:
    for field in _FIELDS:
        value = config.raw(field)
        for ids in value.values() if isinstance(value, dict) else (value,):
            if isinstance(ids, list):
                yield from ids
