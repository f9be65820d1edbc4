"""Answers on a terminal: side by side while they come, or as plain lines where nobody watches."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import TracebackType
from typing import Final, Protocol, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from peft_serve.commands.answers import Answer
from peft_serve.commands.speech import Speech

COLOURS: Final = ("cyan", "magenta", "green", "yellow", "blue", "bright_red")
_NARROWEST: Final = 28  # characters of a column; with less they stand one below the other
_PER_S: Final = 12


class View(Protocol):
    """A context manager that is told about answers as they change."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def show(self, answers: Sequence[Answer]) -> None: ...

    def end(self, answers: Sequence[Answer]) -> None: ...


class Lines:
    """A single answer is written as it comes; several, or a program's, one behind the other when all are there."""

    def __init__(self, speech: Speech, *, is_single: bool) -> None:
        self._speech = speech
        self._is_live = is_single and not speech.as_json
        self._written = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def show(self, answers: Sequence[Answer]) -> None:
        if not self._is_live:
            return
        text = answers[0].text
        sys.stdout.write(_plain(text[self._written :]))
        sys.stdout.flush()
        self._written = max(self._written, len(text))

    def end(self, answers: Sequence[Answer]) -> None:
        if self._speech.as_json:
            return
        if self._is_live:
            sys.stdout.write("\n" if self._written or answers[0].failure is None else "")
            sys.stdout.flush()
            if answers[0].failure is None and self._speech.err.is_terminal:
                self._speech.err.print(answers[0].figures, style="dim")
            return
        for answer in answers:
            said = answer.text if answer.failure is None else f"({answer.failure.message})"
            sys.stdout.write(f"[{answer.adapter}] {_plain(said).strip()}\n")


class Columns:
    """A column for each answer, in its colour, redrawn as they come; the whole of them stays at the end."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Live(console=console, refresh_per_second=_PER_S, vertical_overflow="ellipsis")

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def show(self, answers: Sequence[Answer]) -> None:
        self._live.update(side_by_side(answers, self._console.width))

    def end(self, answers: Sequence[Answer]) -> None:
        self.show(answers)


def side_by_side(answers: Sequence[Answer], width: int) -> RenderableType:
    """The answers in columns, or one below the other where the terminal is too narrow for that."""
    panels = [_panel(answer, COLOURS[i % len(COLOURS)]) for i, answer in enumerate(answers)]
    if width < _NARROWEST * len(answers):
        return Group(*panels)
    table = Table.grid(expand=True)
    for _ in panels:
        table.add_column(ratio=1)
    table.add_row(*panels)
    return Group(Rule(Text("one batch", style="dim"), style="dim"), table)


def _panel(answer: Answer, colour: str) -> Panel:
    if answer.failure is not None:
        body = Text(answer.failure.message, style="red")
    else:
        body = Text(_plain(answer.text))
        body.append("" if answer.is_over else "▌", style=colour)
    return Panel(body, title=Text(answer.adapter), subtitle=Text(answer.brief, style="dim"), border_style=colour)


def _plain(text: str) -> str:
    """Without the control characters by which an answer could move the cursor or rename the window."""
    return "".join(c for c in text if c in "\n\t" or (ord(c) >= 32 and not 127 <= ord(c) < 160))
