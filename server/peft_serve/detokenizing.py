"""Text as it comes, token by token: whole characters only, and no further than a stop string.

Knows no tokenizer but the function that decodes its ids.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

_REPLACEMENT = "\ufffd"  # what an incomplete UTF-8 sequence decodes to


class Detokenizer:
    """Turns ids into text as they come, never showing half a character.

    Some tokenizers decode a token differently at the start of a text (a leading space is dropped), so each piece
    is read as the difference between two decodings that share a few ids of context.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], context: Sequence[int]) -> None:
        self._decode = decode
        self._ids = list(context)
        self._start = 0
        self._read = len(self._ids)

    def push(self, token: int) -> str:
        """The text that `token` completes, perhaps none."""
        self._ids.append(token)
        known = self._decode(self._ids[self._start : self._read])
        text = self._decode(self._ids[self._start :])
        if len(text) <= len(known) or text.endswith(_REPLACEMENT):
            return ""
        self._start, self._read = self._read, len(self._ids)
        return text[len(known) :]

    def flush(self) -> str:
        """What is left at the end, an incomplete character included."""
        known = self._decode(self._ids[self._start : self._read])
        text = self._decode(self._ids[self._start :])
        self._start, self._read = self._read, len(self._ids)
        return text[len(known) :]


class StopFinder:
    """Finds stop strings in text that comes in pieces, holding back what may become one."""

    def __init__(self, stops: Sequence[str], *, keep_stop: bool) -> None:
        self._stops = tuple(s for s in stops if s)
        self._keep_stop = keep_stop
        self._held = ""
        self.found: str | None = None

    def push(self, piece: str) -> str:
        """The text that is safe to show now. After a stop string was found, nothing more is."""
        if self.found is not None:
            return ""
        self._held += piece
        hits = [(self._held.find(s), s) for s in self._stops if s in self._held]
        if hits:
            at, self.found = min(hits, key=lambda hit: (hit[0], -len(hit[1])))
            shown = self._held[: at + (len(self.found) if self._keep_stop else 0)]
            self._held = ""
            return shown
        keep = self._num_possible()
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return shown

    def flush(self) -> str:
        """What was held back and did not become a stop string."""
        shown, self._held = self._held, ""
        return shown if self.found is None else ""

    def _num_possible(self) -> int:
        longest = max((len(s) for s in self._stops), default=0)
        for n in range(min(longest - 1, len(self._held)), 0, -1):
            if any(s.startswith(self._held[-n:]) for s in self._stops):
                return n
        return 0
