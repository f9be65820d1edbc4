"""What is shown while a base is loaded, and while bytes travel."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers.utils import logging as transformers_logging

from peft_serve.commands import adapter_transfer
from peft_serve.commands.base_progress import BaseProgress
from peft_serve.commands.speech import Speech
from peft_serve.model.loader import load_base
from tests.parity.bases import save_tiny_base


def terminal() -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=100, color_system=None)


def written(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_weights_of_a_base_are_counted_on_a_terminal(tmp_path: Path) -> None:
    save_tiny_base("llama", tmp_path / "base")
    console = terminal()
    with BaseProgress(console) as progress:
        load_base(str(tmp_path / "base"), on_progress=progress.say)
    text = written(console)
    assert "reading the configuration" in text
    assert "loading weights" in text
    assert "━" in text, "a bar"


def test_bars_count_what_passes_and_transformers_gets_its_own_back() -> None:
    console = terminal()
    earlier = transformers_logging.set_tqdm_hook(None)
    with BaseProgress(console) as progress:
        assert list(transformers_logging.tqdm(range(250), desc="Loading weights")) == list(range(250))
        with transformers_logging.tqdm(total=10, desc="Shards") as bar:
            bar.update(4)
            bar.set_description("Shards of it")
            bar.set_postfix(file="a")
        found = {task.description: (task.completed, task.total) for task in progress._bars.tasks}
    assert found == {"loading weights": (250, 250), "shards of it": (4, 10)}
    assert transformers_logging.set_tqdm_hook(earlier) is None


def test_without_a_terminal_there_are_lines_alone() -> None:
    console = Console(file=io.StringIO(), width=100)
    with BaseProgress(console) as progress:
        progress.say("loading [the] weights")
        assert list(transformers_logging.tqdm([1, 2], desc="Loading weights")) == [1, 2]
    assert written(console) == "  loading [the] weights\n"


@pytest.mark.parametrize(("as_json", "shows"), [(False, True), (True, False)])
def test_bytes_that_travel_are_shown_to_people_only(as_json: bool, shows: bool) -> None:
    speech = Speech(as_json=as_json)
    speech.err = terminal()
    with adapter_transfer._bar(speech, "sending", 1000) as advance:
        advance(1000)
    assert ("sending" in written(speech.err)) is shows


def test_names_and_reasons_are_never_markup(capsys: pytest.CaptureFixture[str]) -> None:
    speech: Any = Speech()
    speech.note("an [bold]adapter[/bold]")
    assert "[bold]adapter[/bold]" in capsys.readouterr().err
