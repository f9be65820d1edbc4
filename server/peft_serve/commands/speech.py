"""What a command says: results to stdout, as text for people or one JSON document for programs; all else to stderr."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Final

import typer
from rich.console import Console, RenderableType
from rich.markup import escape

from peft_serve.commands.exits import CommandFailed

_PIPED_WIDTH: Final = 140  # characters, where there is no window: wide enough for a digest beside other columns

JsonOption = Annotated[bool, typer.Option("--json", help="print one JSON document, for programs")]


class Speech:
    """The mouth of one command. Names and reasons of adapters are text, never markup."""

    def __init__(self, *, as_json: bool = False) -> None:
        self.as_json = as_json
        self.out = Console(highlight=False)
        if not self.out.is_terminal and "COLUMNS" not in os.environ:
            self.out.width = _PIPED_WIDTH
        self.err = Console(stderr=True, highlight=False)

    def tell(self, content: Any, shown: RenderableType) -> None:
        """The result: `content` as JSON, or `shown` for people."""
        if self.as_json:
            typer.echo(json.dumps(content, indent=2))
        else:
            self.out.print(shown)

    def note(self, line: str) -> None:
        """A remark beside the result; nothing of it reaches a program."""
        self.err.print(escape(line), soft_wrap=True)

    @contextmanager
    def ending(self) -> Iterator[None]:
        """Turn a CommandFailed into its words and its exit code; one that Ctrl-C ends says so."""
        try:
            yield
        except KeyboardInterrupt:
            self.note("interrupted")
            raise
        except CommandFailed as failure:
            self._tell_failure(failure)
            raise typer.Exit(failure.exit_code) from None

    def _tell_failure(self, failure: CommandFailed) -> None:
        if self.as_json:
            error: dict[str, Any] = {"code": failure.code, "message": failure.message}
            if failure.status is not None:
                error["status"] = failure.status
            if failure.errors:
                error["errors"] = [{"path": path, "reason": reason} for path, reason in failure.errors]
            typer.echo(json.dumps({"error": error}, indent=2))
            return
        self.err.print(f"[red]{failure.code}:[/red] {escape(failure.message)}", soft_wrap=True)
        if failure.message == "; ".join(f"{path}: {reason}" for path, reason in failure.errors):
            return  # the message has said all of them
        for path, reason in failure.errors:
            self.err.print(f"  [bold]{escape(path)}[/bold]: {escape(reason)}", soft_wrap=True)
