"""A number and what it counts, in words."""

from __future__ import annotations


def counted(number: float, noun: str) -> str:
    """`1 replica`, `2 replicas`, `no replica`; `noun` takes an s."""
    if number == 0:
        return f"no {noun}"
    return f"{number:g} {noun}" if number == 1 else f"{number:g} {noun}s"
