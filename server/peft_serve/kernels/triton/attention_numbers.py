"""What the numbers in the attention kernel's tables mean, for those who write them and the programs that read them."""

from __future__ import annotations

from typing import Final

TILE_SIZE: Final = 12
"""Numbers of a tile: first token, tokens (0: nothing to do), context position of the first token, first and last + 1 of
its readable positions, gap, positions in front that carry none, where the row's blocks begin, first part (-1: the
result is whole), row, and two of no meaning, which keep tiles at multiples of 16 bytes."""

MERGE_SIZE: Final = 4
"""Numbers of a merge: token, first part, parts from one to the next, how many (0: nothing to do)."""

PART_TAIL: Final = 8
"""Numbers behind the sums of a part: the largest score, the shares' total, and what keeps parts aligned."""
