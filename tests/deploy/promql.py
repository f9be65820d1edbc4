"""As much of PromQL as it takes to say which series, labels and values an expression needs, and under which function.

An expression is cut into strings, durations, words, numbers and signs; a word is a series unless it is a function
(before a parenthesis), an operator, or inside a list of labels. Grafana's variables
stand where durations and values do.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

_TOKEN = re.compile(
    r"""(?P<string>"(?:[^"\\]|\\.)*")|(?P<range>\[[^\]]+\])|(?P<word>[A-Za-z_:][A-Za-z0-9_:]*)|(?P<number>\d[\d.e]*)"""
    r"""|(?P<sign>==|!=|=~|!~|>=|<=|[-+*/^%><={}(),])|(?P<space>\s+)""",
    re.VERBOSE,
)
_LISTS = frozenset({"by", "without", "on", "ignoring", "group_left", "group_right"})
_OPERATORS = frozenset({"and", "or", "unless", "bool", "offset", "inf"})


@dataclass(frozen=True)
class Selector:
    """One series that an expression reads."""

    name: str
    matchers: tuple[tuple[str, str, str], ...]  # label, operator, value
    has_range: bool
    function: str | None  # whose argument it is


@dataclass(frozen=True)
class Query:
    """What an expression needs."""

    selectors: tuple[Selector, ...]
    grouped: frozenset[str]  # labels in its lists
    functions: frozenset[str]


def parsed(expression: str) -> Query:
    """Raises ValueError for what is no token, and for parentheses that do not close."""
    return _Reading(list(_tokens(expression))).query()


def _tokens(expression: str) -> Iterator[tuple[str, str]]:
    place = 0
    while place < len(expression):
        found = _TOKEN.match(expression, place)
        if found is None:
            raise ValueError(f"{expression[place : place + 20]!r} is no PromQL")
        place = found.end()
        kind = found.lastgroup
        assert kind is not None, "every alternative has a name"
        if kind != "space":
            yield kind, found.group()


class _Reading:
    def __init__(self, tokens: list[tuple[str, str]]) -> None:
        self._tokens = tokens
        self._at = 0
        self._open: list[str | None] = []  # the function of each open parenthesis
        self._selectors: list[Selector] = []
        self._grouped: set[str] = set()
        self._functions: set[str] = set()

    def query(self) -> Query:
        while self._at < len(self._tokens):
            kind, text = self._take()
            if kind == "word":
                self._word(text)
            elif text == "(":
                self._open.append(None)
            elif text == ")":
                if not self._open:
                    raise ValueError("a parenthesis closes that was not opened")
                self._open.pop()
        if self._open:
            raise ValueError("a parenthesis does not close")
        return Query(tuple(self._selectors), frozenset(self._grouped), frozenset(self._functions))

    def _take(self) -> tuple[str, str]:
        self._at += 1
        return self._tokens[self._at - 1]

    def _next_is(self, text: str) -> bool:
        return self._at < len(self._tokens) and self._tokens[self._at][1] == text

    def _word(self, word: str) -> None:
        if word in _LISTS:
            self._list()
        elif word in _OPERATORS:
            return
        elif self._next_is("("):
            self._take()
            self._functions.add(word)
            self._open.append(word)
        elif self._at < len(self._tokens) and self._tokens[self._at][1] in _LISTS:  # sum by (..) (..)
            self._functions.add(word)
            self._take()
            self._list()
            if self._next_is("("):
                self._take()
                self._open.append(word)
        else:
            self._selector(word)

    def _list(self) -> None:
        if self._next_is("("):
            self._take()
            while (token := self._take())[1] != ")":
                if token[0] == "word":
                    self._grouped.add(token[1])

    def _selector(self, name: str) -> None:
        matchers = []
        if self._next_is("{"):
            self._take()
            while not self._next_is("}"):
                label, sign, value = (self._take()[1] for _ in range(3))
                matchers.append((label, sign, value[1:-1]))
                if self._next_is(","):
                    self._take()
            self._take()
        has_range = self._at < len(self._tokens) and self._tokens[self._at][0] == "range"
        inside = next((function for function in reversed(self._open) if function is not None), None)
        self._selectors.append(Selector(name, tuple(matchers), has_range, inside))
