"""Commands against a server over fakes, behind a real socket."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from peft_serve.cli import app
from tests.api.api_fakes import World, checkpoint, make_world
from tests.api.conftest import populate, running, served
from tests.parity.bases import save_tiny_base


@dataclass(frozen=True)
class Said:
    """What a command said, and how it ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def all(self) -> str:
        """Everything, on one line and without colours."""
        return " ".join(re.sub(r"\x1b\[[0-9;]*m", "", self.out + self.err).split())


def run(*words: str, stdin: str = "", env: Mapping[str, str | None] | None = None) -> Said:
    """The command `peft-serve words..`."""
    narrow = {"COLUMNS": "200", "PEFT_SERVE_CONFIG": None, "PEFT_SERVE_URL": None}
    result = CliRunner().invoke(app, list(words), input=stdin, env={**narrow, **(env or {})})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Said(result.exit_code, result.stdout, result.stderr)


@pytest.fixture
def world(tiny_tokenizer: Any, tmp_path: Path) -> Iterator[World]:
    made = make_world(tiny_tokenizer, tmp_path / "server")
    populate(made)
    with running(made):
        yield made


@pytest.fixture
def url(world: World) -> Iterator[str]:
    with served(world) as address:
        yield address


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint as peft leaves it, with files around it that nobody needs."""
    return write_checkpoint(
        tmp_path / "fresh", checkpoint("fresh") | {"README.md": b"# mine", "optimizer.pt": b"x" * 99}
    )


def write_checkpoint(path: Path, files: Mapping[str, bytes]) -> Path:
    path.mkdir(parents=True)
    for name, content in files.items():
        (path / name).write_bytes(content)
    return path


@pytest.fixture(scope="session")
def saved_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases") / "tiny"
    save_tiny_base("llama", folder)
    return folder


@pytest.fixture
def base(saved_base: Path, tmp_path: Path) -> Path:
    """A base of one's own to spoil."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    for each in saved_base.iterdir():
        (folder / each.name).write_bytes(each.read_bytes())
    return folder
