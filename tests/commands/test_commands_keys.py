"""`peft-serve keys`: a key is shown once, its entry is what the server reads, and a file is checked as it would be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from peft_serve.api.key_file import hash_of, read_keys
from peft_serve.api.keyring import Keyring
from peft_serve.cli import app
from peft_serve.commands.exits import CommandFailed, Exit
from peft_serve.commands.link import authorization, refusal_of
from peft_serve.commands.serving import warn_of_openness
from peft_serve.config import Settings

NEW = ["keys", "new", "--tenant", "acme", "--scopes", "infer,upload", "--adapters", "a-*,b", "--adapters", "c"]


def test_a_new_key_opens_what_its_entry_says(tmp_path: Path) -> None:
    ran = CliRunner().invoke(app, [*NEW, "--no-base", "--note", "of the night shift"])
    assert ran.exit_code == 0
    token, _, entry = ran.stdout.partition("\n")
    file = tmp_path / "keys.yaml"
    file.write_text("keys:\n" + entry)
    found = Keyring(path=file).find(token)
    assert found is not None
    assert found.tenant.name == "acme"
    assert found.scopes == {"infer", "upload"}
    assert [found.sees(name) for name in ("a-1", "b", "c", "d")] == [True, True, True, False]
    assert not found.may_ask_base
    assert token not in entry
    assert token not in ran.stderr
    checked = CliRunner().invoke(app, ["keys", "check", str(file), "--json"])
    assert json.loads(checked.stdout)["keys"][0]["adapters"] == ["b", "c", "a-*"]
    assert token not in checked.output
    assert "acme" in CliRunner().invoke(app, ["keys", "check", str(file)]).stdout


def test_keys_are_256_random_bits_each(tmp_path: Path) -> None:
    made = [json.loads(CliRunner().invoke(app, [*NEW, "--json"]).stdout) for _ in range(3)]
    tokens = {each["key"] for each in made}
    assert len(tokens) == 3
    assert all(len(token) == len("psk_") + 43 for token in tokens)
    keys = yaml.safe_dump({"keys": [each["entry"] for each in made]})
    assert set(read_keys(keys.encode())) == {hash_of(token) for token in tokens}


@pytest.mark.parametrize("wrong", [["--scopes", "root"], ["--tenant", "a b"], ["--adapters", "a*b"]])
def test_what_no_file_may_say_is_no_key(wrong: list[str]) -> None:
    ran = CliRunner().invoke(app, ["keys", "new", "--tenant", "acme", *wrong])
    assert ran.exit_code == 2
    assert wrong[0] in ran.output
    assert "psk_" not in ran.output


def test_a_broken_file_is_told_of(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    assert CliRunner().invoke(app, ["keys", "check", str(file)]).exit_code == 2
    file.write_text("keys: [{tenant: a}]")
    ran = CliRunner().invoke(app, ["keys", "check", str(file), "--json"])
    assert ran.exit_code == 1
    assert "keys.0.key" in json.loads(ran.stdout)["error"]["message"]


def test_a_file_that_withdraws_every_key_is_none_that_is_empty(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    file.write_text("keys: []\n")
    ran = CliRunner().invoke(app, ["keys", "check", str(file)])
    assert ran.exit_code == 0
    assert "no keys: every request with a key is refused" in ran.stderr
    file.write_text("")
    ran = CliRunner().invoke(app, ["keys", "check", str(file)])
    assert ran.exit_code == 1
    assert "is empty; it has to say `keys:`" in ran.stderr


def test_commands_send_the_key_of_the_environment() -> None:
    assert authorization({"PEFT_SERVE_API_KEY": " psk_x\n"}) == {"authorization": "Bearer psk_x"}
    assert authorization({"PEFT_SERVE_API_KEY": ""}) == authorization({}) == {}
    for whole_file in ("psk_secret\n- tenant: a", "psk_secret psk_two", "psk_s\u00e9cret"):
        with pytest.raises(CommandFailed, match="PEFT_SERVE_API_KEY: holds") as caught:
            authorization({"PEFT_SERVE_API_KEY": whole_file})
        assert caught.value.exit_code is Exit.USAGE
        assert "psk" not in str(caught.value)
    assert "PEFT_SERVE_API_KEY" in refusal_of(401, {}).message


@pytest.mark.parametrize(
    ("host", "token", "is_warned"),
    [
        ("127.0.0.1", None, False),
        ("localhost", None, False),
        ("::1", None, False),
        ("0.0.0.0", None, True),
        ("::", None, True),
        ("192.168.1.7", None, True),
        ("gpu-box", None, True),
        ("0.0.0.0", "psk_0123456789abcdef", False),
    ],
)
def test_a_server_that_others_reach_says_that_it_asks_for_no_key(
    host: str, token: str | None, is_warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    warn_of_openness(Settings(host=host), Keyring(token))
    assert ("asks for no key" in caplog.text) is is_warned
