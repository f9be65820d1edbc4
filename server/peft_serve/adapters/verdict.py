"""What the gate finds wrong or odd with one checkpoint, collected so that an uploader sees all of it at once.

Owns the two lists and their bounds; knows nothing about configs or tensors.
"""

from __future__ import annotations

from peft_serve.errors import AdapterInvalid, Refusal

MAX_REFUSALS = 10
MAX_WARNINGS = 20
MAX_QUOTED = 120


def quoted(name: object) -> str:
    """An uploader's word, made safe to repeat in a message: escaped and cut."""
    text = str(name)
    return ascii(text if len(text) <= MAX_QUOTED else text[:MAX_QUOTED] + "...")


class Verdict:
    """Refusals and warnings about one checkpoint; beyond the bounds they are counted no further."""

    def __init__(self) -> None:
        self._refusals: list[Refusal] = []
        self._warnings: list[str] = []

    def refuse(self, path: str, reason: str) -> None:
        """Note a reason to refuse; `path` may be an uploader's word and is made printable."""
        if len(self._refusals) < MAX_REFUSALS:
            self._refusals.append(Refusal(path if path.isprintable() else quoted(path), reason))

    def adopt(self, error: AdapterInvalid) -> None:
        """Take over the refusals of a check that stopped by itself."""
        for refusal in error.errors:
            self.refuse(refusal.path, refusal.reason)

    def warn(self, text: str) -> None:
        if text not in self._warnings and len(self._warnings) < MAX_WARNINGS:
            self._warnings.append(text)

    @property
    def warnings(self) -> tuple[str, ...]:
        return tuple(self._warnings)

    def settle(self) -> None:
        """Raise `AdapterInvalid` with everything found so far, if anything was."""
        if self._refusals:
            raise AdapterInvalid(self._refusals)
