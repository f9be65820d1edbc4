"""docs/command-line.md: every command in it is run, against a server of the demo base, and every command is in it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer.main

from peft_serve.cli import app
from peft_serve.commands.configuration import read_file
from peft_serve.commands.exits import Exit
from peft_serve.commands.options import VLLM_NAMES, flag
from peft_serve.config import Settings
from peft_serve.engine.assembly import build
from tests.api.conftest import served
from tests.commands.conftest import run
from tests.conftest import REPOSITORY

PAGE = (REPOSITORY / "docs" / "command-line.md").read_text()
NOT_RUN = ("peft-serve --install-completion",)  # it would write to the shell's own files
BY_ITSELF = ("serve", "serve-ray")  # they serve until stopped; tests/test_cli.py and tests/cluster start them


def examples() -> list[str]:
    """The lines of the page's bash blocks, without their comments."""
    blocks = re.findall(r"^```bash\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    lines = [line.split("  #")[0].split(" # ")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line and line not in NOT_RUN]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    settings = Settings(model="demo-llama", store=tmp_path_factory.mktemp("store"), num_threads=1)
    parts, engine = build(settings, lambda _line: None)
    engine.start()
    made: Any = SimpleNamespace(parts=parts)
    with served(made) as address:
        yield address
    engine.stop()


def words_of(line: str, url: str) -> tuple[list[str], str]:
    """A line's words behind `peft-serve`, and what is piped into it."""
    stdin = ""
    if "|" in line:
        before, line = line.split("|")
        stdin = shlex.split(before)[1]
    words = shlex.split(line.replace("http://127.0.0.1:8000", url))
    assert words[0] == "peft-serve", line
    return words[1:], stdin


def test_every_example_runs_in_the_order_of_the_page(
    demo: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = examples()
    assert len(lines) > 25
    for line in lines:
        words, stdin = words_of(line, demo)
        said = run(*words, stdin=stdin, env={"PEFT_SERVE_URL": demo})
        assert said.code == 0, f"{line}\n{said.out}\n{said.err}"


def test_every_command_has_an_example() -> None:
    named = [words_of(line, "")[0] for line in examples()]
    commands: list[tuple[str, ...]] = []
    for command in app.registered_commands:
        name = command.name or command.callback.__name__  # type: ignore[union-attr]
        if name not in BY_ITSELF and name != "version":
            commands.append((name,))
    for group in app.registered_groups:
        assert group.typer_instance is not None
        inner = typer.main.get_group(group.typer_instance)
        commands += [(str(group.name), name) for name in inner.commands]
    assert len(commands) > 15
    missing = [each for each in commands if not any(tuple(words[: len(each)]) == each for words in named)]
    assert not missing


def test_the_file_of_the_page_is_one(tmp_path: Path) -> None:
    (block,) = re.findall(r"^```yaml\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    (tmp_path / "server.yaml").write_text(block)
    assert set(read_file(tmp_path / "server.yaml")) == {"model", "max_rank", "adapters", "max_rows"}


def test_the_tables_are_those_of_the_code() -> None:
    rows = re.findall(r"^\| `(--[a-z-]+)` \| `(--[a-z-]+)`", PAGE, re.MULTILINE)
    assert dict(rows) == {flag(theirs): flag(ours) for ours, theirs in VLLM_NAMES.items()}
    codes = re.findall(r"^\| (\d) \| ", PAGE, re.MULTILINE)
    assert [int(code) for code in codes] == [code.value for code in Exit]
    same = PAGE[PAGE.index("`--served-model-name`, `--dtype`") : PAGE.index("are called alike")]
    alike = re.findall(r"`--([a-z-]+)`", same)
    assert len(alike) == 10
    assert {name.replace("-", "_") for name in alike} <= set(Settings.model_fields)
