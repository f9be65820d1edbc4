"""Which replicas a front can begin with: during an update there are old and new ones, and a front is of one kind.

A front takes requests for replicas that were started with its own limits and base, and for no others. One that began
with replicas that are about to be replaced would have none a moment later.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from hashlib import sha256
from typing import Final

from peft_serve.cluster.replicas import ReplicaLost, Replicas
from peft_serve.cluster.wire import BaseFacts
from peft_serve.config import Settings

WAITED_S: Final = 60.0
"""So long a front waits for such a replica: the new ones may never come, and the old ones serve."""

TOLD_APART_BY: Final = (
    "model",
    "revision",
    "served_model_name",
    "dtype",
    "device",
    "quantisation",
    "max_model_len",
    "allow_chat_templates",
    "max_new_tokens",
    "max_rank",
    "max_adapter_bytes",
    "device_adapter_bytes",
    "max_virtual_tokens",
    "max_compile_tflop",
)
"""The settings that say what the base is and which adapters are let in."""

_LOOK_S: Final = 0.5

_log = logging.getLogger(__name__)


def mark_of(settings: Settings) -> str:
    """Equal where a front and a replica were started for each other."""
    told = [(name, getattr(settings, name)) for name in TOLD_APART_BY]
    return sha256(repr(told).encode()).hexdigest()


async def fitting_facts(
    replicas: Replicas, mark: str, *, clock: Callable[[], float], sleep: Callable[[float], Awaitable[None]]
) -> BaseFacts:
    """What a replica with this mark tells, as soon as there is one; after `WAITED_S`, what one without it tells."""
    facts = await replicas.facts()  # waits for the first one
    until_s, is_told = clock() + WAITED_S, False
    while facts.mark != mark and clock() < until_s:
        if not is_told:
            _log.info("replicas of other settings are there; waiting for those that are to replace them")
            is_told = True
        await sleep(_LOOK_S)
        try:
            found = await replicas.all_facts()
        except ReplicaLost:
            continue
        facts = next((each for each in found if each.mark == mark), facts)
    return facts
