"""The command: what it refuses before a base is loaded, and what it says."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import peft_serve
from peft_serve.cli import app
from peft_serve.config import Settings
from peft_serve.engine.adapter_places import open_store, shipped_adapters
from peft_serve.engine.assembly import build
from peft_serve.errors import Unavailable
from tests.parity.bases import save_tiny_base

RUNNER = CliRunner()


def said(*arguments: str) -> tuple[int, str]:
    result = RUNNER.invoke(app, list(arguments), env={"COLUMNS": "400"})
    return result.exit_code, " ".join(re.sub(r"\x1b\[[0-9;]*m", "", result.output).split())


def test_the_version_is_told_both_ways() -> None:
    assert said("--version") == (0, peft_serve.__version__)
    assert said("version") == (0, peft_serve.__version__)


def test_every_setting_is_an_option_with_its_environment_variable() -> None:
    code, text = said("serve", "--help")
    assert code == 0
    for name in Settings.model_fields:
        if name != "model":
            assert f"--{name.replace('_', '-')}" in text


@pytest.mark.parametrize("when", ["peft_serve.cli", "typer", "torch", "peft_serve.engine.assembly"])
def test_ctrl_c_while_the_command_is_imported_is_one_line(when: str, tmp_path: Path) -> None:
    """As if it came while `when` is imported, which takes seconds where torch is."""
    program = f"""
import importlib.abc, runpy, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has its background jobs ignore it
class Pressed(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == {when!r}:
            signal.raise_signal(signal.SIGINT)
sys.meta_path.insert(0, Pressed())
sys.argv = ["peft-serve", "serve", "--port", "0", "--store", {str(tmp_path)!r}]
runpy.run_module("peft_serve", run_name="__main__")
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stderr.strip(), ended.stdout) == (130, "interrupted", "")


@pytest.mark.parametrize(
    ("option", "value"), [("--port", "70000"), ("--max-rank", "0"), ("--device", "tpu"), ("--drain-s", "-1")]
)
def test_a_value_outside_its_range_names_the_option(option: str, value: str) -> None:
    code, text = said("serve", option, value)
    assert code == 2
    assert option in text


def test_a_port_in_use_is_found_before_the_base_is_loaded() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        code, text = said("serve", "--port", port)
    assert code == 1
    assert f"--port {port}" in text
    assert "loading" not in text
    code, text = said("serve", "--host", "192.0.2.1")  # of no machine
    assert (code, "--host 192.0.2.1" in text) == (2, True)


def test_a_base_that_does_not_exist_is_refused_in_words(tmp_path: Path) -> None:
    code, text = said("serve", str(tmp_path / "nothing"), "--port", "0")
    assert code == 2
    assert "peft-serve does not start" in text


def test_a_context_beyond_learned_positions_is_refused(tmp_path: Path) -> None:
    save_tiny_base("gpt2", tmp_path / "base")
    settings = Settings(model=str(tmp_path / "base"), store=tmp_path / "store", max_model_len=129)
    with pytest.raises(ValueError, match=r"--max-model-len 129.*at most 128"):
        build(settings, say=lambda _line: None)
    open_store(settings, tmp_path / "store").close()  # a start that fails lets go of the store


def test_a_store_in_use_is_found_before_the_base_is_loaded(tmp_path: Path) -> None:
    save_tiny_base("gpt2", tmp_path / "base")
    settings = Settings(model=str(tmp_path / "base"), store=tmp_path / "store", max_model_len=129)
    other = open_store(settings, tmp_path / "store")
    said: list[str] = []
    with pytest.raises(Unavailable, match="in use by another server process"):
        build(settings, say=said.append)
    assert said == []
    other.close()


def test_a_store_that_is_no_folder_is_told_with_its_path_and_why(tmp_path: Path) -> None:
    (tmp_path / "store").write_text("a file")
    with pytest.raises(ValueError, match=r"--store .*store: .*; name a folder") as refusal:
        open_store(Settings(store=tmp_path / "store"), tmp_path / "store")
    assert "exists" in str(refusal.value).lower() or "not a directory" in str(refusal.value).lower()
    with pytest.raises(ValueError, match=r"--store .*store: .*; name a folder"):
        open_store(Settings(store=tmp_path / "store", store_shared=True), tmp_path / "store")


def test_a_base_that_is_not_there_gets_no_store(tmp_path: Path) -> None:
    settings = Settings(model=str(tmp_path / "typo"), store=tmp_path / "store")
    with pytest.raises(ValueError, match="no such folder"):
        build(settings, say=lambda _line: None)
    assert not (tmp_path / "store").exists()


def test_a_folder_of_adapters_that_is_not_there_is_refused(tmp_path: Path) -> None:
    save_tiny_base("gpt2", tmp_path / "base")
    settings = Settings(model=str(tmp_path / "base"), store=tmp_path / "store", adapters=[tmp_path / "typo"])
    with pytest.raises(ValueError, match="no such folder"):
        build(settings, say=lambda _line: None)


def test_the_demo_has_its_adapters_and_other_bases_none() -> None:
    folder = shipped_adapters("demo-llama")
    assert folder is not None
    assert (folder / "twitter-complaints" / "adapter_config.json").is_file()
    assert shipped_adapters("some/base") is None
