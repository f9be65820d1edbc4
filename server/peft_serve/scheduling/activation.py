"""From which token on an adapter acts on a request.

Most act on every token. An adapter with an invocation sequence (activated LoRA, arXiv 2504.12397) acts from the
start of the sequence's last occurrence in the prompt on, and on every token drawn after it; on a prompt without it,
it never acts. As peft's `calculate_alora_offsets`, which reads the prompt of a `generate` once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Final

NEVER: Final = sys.maxsize
"""A context position beyond every token's."""


def active_from(prompt: Sequence[int], start: Sequence[int], *, prefix: int) -> int:
    """The context position of the first token that the adapter acts on; `prefix` positions stand before the prompt."""
    if not start:
        return 0
    place = last_occurrence(prompt, start)
    return NEVER if place is None else prefix + place


def last_occurrence(tokens: Sequence[int], wanted: Sequence[int]) -> int | None:
    """Where `wanted` (not empty) begins in `tokens` for the last time, or None.

    Knuth, Morris and Pratt from the end backwards: linear time, whatever the two repeat.
    """
    borders = _borders(wanted)
    matched = 0
    for place in range(len(tokens) - 1, -1, -1):
        while matched and tokens[place] != wanted[-1 - matched]:
            matched = borders[matched - 1]
        if tokens[place] == wanted[-1 - matched]:
            matched += 1
        if matched == len(wanted):
            return place
    return None


def _borders(wanted: Sequence[int]) -> list[int]:
    """By length of a part of `wanted` read backwards: its longest beginning that is also its end, itself excluded."""
    borders = [0]
    length = 0
    for at in range(1, len(wanted)):
        while length and wanted[-1 - at] != wanted[-1 - length]:
            length = borders[length - 1]
        if wanted[-1 - at] == wanted[-1 - length]:
            length += 1
        borders.append(length)
    return borders
