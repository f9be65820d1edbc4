"""A constraint without a grammar: what may come next is a hash of what came before."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field

from peft_serve.errors import InvalidParameter

VOCABULARY = 11
END = 3  # of every answer here


@dataclass(frozen=True, kw_only=True)
class Path:
    """At most `length` tokens, and the end now and then before. At `breaks_at` it raises."""

    seed: int
    length: int
    eos_ids: frozenset[int]
    breaks_at: int | None = None

    def start(self) -> Walk:
        return Walk(self)


@dataclass
class Walk:
    """One answer's way along the path."""

    path: Path
    tokens: list[int] = field(default_factory=list)

    @property
    def is_over(self) -> bool:
        return len(self.tokens) >= self.path.length

    def mask(self) -> bytes:
        words = {t for t in range(VOCABULARY) if t != END and self._digest(t) % 3 == 0} or {0}
        allowed = set[int]() if self.is_over else words
        if self.is_over or (self.tokens and self._digest(-1) % 4 == 0):
            allowed |= self.path.eos_ids
        return sum(1 << t for t in allowed).to_bytes(2, "little")

    def accept(self, token: int) -> None:
        if len(self.tokens) == self.path.breaks_at:
            raise InvalidParameter("the path ends in a bog; take another")
        assert self.mask()[token // 8] >> token % 8 & 1, "a token that was not allowed"
        self.tokens.append(token)

    def _digest(self, token: int) -> int:
        return zlib.crc32(repr((self.path.seed, self.tokens, token)).encode())
