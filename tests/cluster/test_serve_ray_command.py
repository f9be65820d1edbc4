"""The command: what it refuses before anything is started."""

from __future__ import annotations

import re
import socket

import pytest
from typer.testing import CliRunner

from peft_serve.cli import app
from peft_serve.cluster.plan import Layout
from peft_serve.config import Settings

pytest.importorskip("ray.serve")

RUNNER = CliRunner()


def said(*arguments: str, **environ: str) -> tuple[int, str]:
    result = RUNNER.invoke(app, ["serve-ray", *arguments], env={"COLUMNS": "400", **environ})
    return result.exit_code, " ".join(re.sub(r"\x1b\[[0-9;]*m", "", result.output).split())


def test_every_setting_and_every_figure_of_the_layout_is_an_option() -> None:
    code, text = said("--help")
    assert code == 0
    for name in (*Settings.model_fields, *Layout.model_fields, "address"):
        if name != "model":
            assert f"--{name.replace('_', '-')}" in text


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (("--replicas", "0"), "--replicas"),
        (("--min-replicas", "2"), "--max-replicas"),
        (("--max-rank", "0"), "--max-rank"),
        (("--placement", "nearest"), "--placement"),
    ],
)
def test_a_wrong_option_is_named(options: tuple[str, ...], word: str) -> None:
    code, text = said(*options)
    assert code == 2
    assert word in text


@pytest.mark.parametrize(
    ("options", "word"), [(("--port", "0"), "name one"), (("--cache-trace", "here"), "leave it out with serve-ray")]
)
def test_what_only_one_server_has_is_refused(options: tuple[str, ...], word: str) -> None:
    code, text = said(*options)
    assert code == 1
    assert word in text


def test_a_port_in_use_and_a_cluster_without_a_token_are_found_before_anything_starts() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        code, text = said("--port", port)
        assert (code, f"--port {port}" in text) == (1, True)
    code, text = said("--port", port, RAY_AUTH_MODE="disabled")
    assert (code, "RAY_AUTH_MODE=token" in text) == (1, True)
