"""No file, class or function of the server is longer than a reader keeps in mind."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

SERVER = Path(__file__).resolve().parent.parent / "server" / "peft_serve"
LONGEST = {ast.ClassDef: 250, ast.FunctionDef: 60, ast.AsyncFunctionDef: 60}
LONGEST_FILE = 350


def too_long(text: str) -> Iterator[str]:
    """What is too long in a file, with its number of lines."""
    if (num_lines := len(text.splitlines())) > LONGEST_FILE:
        yield f"the file: {num_lines}"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            num_lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if num_lines > LONGEST[type(node)]:
                yield f"{node.name}: {num_lines}"


def test_nothing_of_the_server_is_too_long() -> None:
    found = {path.relative_to(SERVER): [*too_long(path.read_text())] for path in SERVER.rglob("*.py")}
    assert len(found) > 200
    assert {str(path): what for path, what in found.items() if what} == {}


def test_what_is_too_long_is_found() -> None:
    def function(num_lines: int) -> str:
        return "def f():\n" + "    pass\n" * (num_lines - 1)

    assert [*too_long(function(60))] == []
    assert [*too_long(function(61))] == ["f: 61"]
    assert [*too_long("async " + function(61))] == ["f: 61"]
    assert [*too_long("class A:\n" + "    x = 1\n" * 250)] == ["A: 251"]
    assert [*too_long("x = 1\n" * 351)] == ["the file: 351"]
