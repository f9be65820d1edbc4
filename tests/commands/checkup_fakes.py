"""A machine on which all is well, and what is said of findings."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from peft_serve.commands.checkup.finding import Finding, State
from peft_serve.commands.checkup.machine import Machine
from peft_serve.config import GIB


class GoodMachine(Machine):
    """A machine on which all is well, whatever this one is like; tests spoil one fact each."""

    def __init__(self, **facts: Any) -> None:
        self._facts = facts

    def requirements(self) -> list[str]:
        return ["torch>=2.11", "rich>=13.9", 'peft>=0.21; extra == "verify"']

    def python(self) -> tuple[int, int]:
        return self._facts.get("python", (3, 12))

    def version(self, package: str) -> str | None:
        versions = {"torch": "2.13.0", "rich": "15.0", "transformers": "5.23", "peft-serve": "0.1.0"}
        return {**versions, **self._facts.get("versions", {})}.get(package)

    def num_cores(self) -> int:
        return 8

    def free_memory(self) -> int | None:
        return self._facts.get("free_memory", 64 * GIB)

    def free_disk(self, path: Path) -> int | None:
        return self._facts.get("free_disk", 64 * GIB)

    def can_write(self, path: Path) -> bool:
        return self._facts.get("can_write", True)

    def can_listen(self, host: str, port: int) -> str:
        return self._facts.get("can_listen", "")

    def has_nvidia(self) -> bool:
        return self._facts.get("has_nvidia", False)

    def torch_cuda(self) -> tuple[str | None, bool]:
        return self._facts.get("torch_cuda", (None, False))


def bad(findings: Iterable[Finding]) -> list[str]:
    """What is not fine, as one text each."""
    return [f"{each.place}: {each.fact} -> {each.way_out}" for each in findings if each.state is not State.FINE]


def found(findings: Iterable[Finding], *words: str, state: State = State.WRONG) -> None:
    """Exactly one thing is not fine, it is in this state, and its text has all of these words."""
    listed = list(findings)
    texts = bad(listed)
    assert len(texts) == 1, texts
    assert [each.state for each in listed if each.state is not State.FINE] == [state]
    assert all(word in texts[0] for word in words), texts[0]
