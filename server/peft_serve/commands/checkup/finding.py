"""One thing that a checkup found: in order, odd, or wrong; what is wrong comes with its rule and a way out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum


class State(StrEnum):
    """How a thing stands. Only WRONG fails a checkup."""

    FINE = "fine"
    ODD = "odd"
    WRONG = "wrong"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """`place` is what was looked at, `fact` what is so; `way_out` is what to do, for all that is not fine."""

    place: str
    state: State
    fact: str
    way_out: str = ""

    def __post_init__(self) -> None:
        assert self.state is State.FINE or self.way_out, f"{self.place}: what is not fine needs a way out"


def fine(place: str, fact: str) -> Finding:
    return Finding(place=place, state=State.FINE, fact=fact)


def odd(place: str, fact: str, way_out: str) -> Finding:
    return Finding(place=place, state=State.ODD, fact=fact, way_out=way_out)


def wrong(place: str, fact: str, way_out: str) -> Finding:
    return Finding(place=place, state=State.WRONG, fact=fact, way_out=way_out)


def told(place: str, message: str, state: State = State.WRONG) -> Finding:
    """A finding from a message of ours, which names the rule and the way out around a semicolon."""
    fact, _, way_out = message.partition("; ")
    return Finding(place=place, state=state, fact=fact, way_out=way_out or "the fact names what to change")


def is_healthy(findings: Sequence[Finding]) -> bool:
    return all(finding.state is not State.WRONG for finding in findings)
