"""Settings by flag, environment, file and default; typos; vLLM's names; what `config show` tells."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import field_validator

from peft_serve.cli import app
from peft_serve.commands import configuration
from peft_serve.commands.configuration import ConfigurationInvalid, Source, configured, nearest, read_file
from peft_serve.commands.options import VLLM_NAMES, setting_named
from peft_serve.config import Settings
from tests.commands.conftest import run


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "server.yaml"


def test_the_strongest_place_wins(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_text("max_rank: 8\nmax_rows: 9\nmax-queue: 10\nmodel: demo-t5\n")
    environ = {"PEFT_SERVE_MAX_RANK": "16", "PEFT_SERVE_MAX_ROWS": "17", "PATH": "/bin"}
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    found = configured({"max_rank": 32, "max_rows": None, "adapters": []}, environ, file)
    settings = found.settings
    assert (settings.max_rank, settings.max_rows, settings.max_queue, settings.model) == (32, 17, 10, "demo-t5")
    places = {origin.name: (origin.source, origin.place) for origin in found.origins}
    assert places["max_rank"] == (Source.FLAG, "--max-rank")
    assert places["max_rows"] == (Source.ENVIRONMENT, "PEFT_SERVE_MAX_ROWS")
    assert places["max_queue"] == (Source.FILE, str(file))
    assert places["port"] == (Source.DEFAULT, "")
    assert set(places) == set(Settings.model_fields)


def test_the_file_may_be_named_by_the_environment(file: Path) -> None:
    file.write_text("max_queue: 10\n")
    assert configured({}, {"PEFT_SERVE_CONFIG": str(file)}).settings.max_queue == 10
    assert run("config", "show", "--json", env={"PEFT_SERVE_CONFIG": str(file)}).json["max_queue"] == 10


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("max_rnk: 8", "max_rnk: is no setting; did you mean max_rank?"),
        ("zzzzz: 8", "peft-serve config show lists them"),
        ("max_rank: 0", "max_rank: Input should be greater than or equal to 1"),
        ("max_rank: 8\nmax_rank: 9", "is there twice"),
        ("max_rank: 8\nmax_lora_rank: 9", "says the same as max_rank"),
        ("- max_rank", "should hold lines such as"),
        ("max_rank: [", "is not YAML"),
        ("model: !!python/object/apply:os.system [ls]", "is not YAML"),
        ("enable_prefix_caching: maybe", "enable_prefix_caching"),
    ],
)
def test_a_wrong_file_is_refused_with_the_place(file: Path, text: str, said: str) -> None:
    file.write_text(text)
    with pytest.raises(ConfigurationInvalid, match=r"server\.yaml") as refusal:
        configured({}, {}, file)
    assert said in str(refusal.value)


def test_a_rule_of_our_own_is_told_without_pydantics_word_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class Odd(Settings):
        @field_validator("max_rank")
        @classmethod
        def _is_odd(cls, _value: int) -> int:
            raise ValueError("should be odd")

    monkeypatch.setattr(configuration, "Settings", Odd)
    with pytest.raises(ConfigurationInvalid) as refusal:
        configured({"max_rank": 4}, {})
    assert refusal.value.lines == ("--max-rank: should be odd (given: 4)",)


def test_words_of_yaml_stay_words_and_nothing_is_nothing(file: Path) -> None:
    file.write_text("prepack: on\nenable_prefix_caching: false\nmax_wait_s:\nadapters: [a, b]\nmax-num-seqs: 3\n")
    assert read_file(file) == {
        "prepack": "on", "enable_prefix_caching": False, "adapters": ["a", "b"], "max_rows": 3,
    }  # fmt: skip
    settings = configured({}, {}, file).settings
    assert (settings.prepack, settings.adapters) == ("on", [Path("a"), Path("b")])
    file.write_text("# nothing yet\n")
    assert read_file(file) == {}
    with pytest.raises(ConfigurationInvalid, match="cannot be read"):
        read_file(file.parent / "typo.yaml")


def test_a_variable_that_is_no_setting_is_refused() -> None:
    with pytest.raises(ConfigurationInvalid, match=r"PEFT_SERVE_MAX_RNK: .*; did you mean PEFT_SERVE_MAX_RANK\?"):
        configured({}, {"PEFT_SERVE_MAX_RNK": "8"})
    with pytest.raises(ConfigurationInvalid, match=r"did you mean PEFT_SERVE_MAX_ROWS\?"):
        configured({}, {"PEFT_SERVE_MAX_NUM_SEQ": "8"})  # vLLM's name is none of a variable
    assert configured({}, {"PEFT_SERVE_URL": "http://x", "OTHER": "1"}).settings == Settings()


def test_what_kubernetes_puts_there_is_no_typo_but_takes_the_port() -> None:
    names = ("PEFT_SERVE_SERVICE_HOST", "PEFT_SERVE_SERVICE_PORT", "PEFT_SERVE_SERVICE_PORT_HTTP")
    tcp = ("PEFT_SERVE_PORT_8000_TCP", "PEFT_SERVE_PORT_8000_TCP_ADDR")
    configured({}, dict.fromkeys((*names, *tcp), "10.0.0.1"))
    with pytest.raises(ConfigurationInvalid, match="enableServiceLinks: false"):
        configured({}, {"PEFT_SERVE_PORT": "tcp://10.0.0.1:8000"})


def test_a_wrong_value_is_told_with_the_place_that_said_it(file: Path) -> None:
    said = run("config", "show", env={"PEFT_SERVE_MAX_RANK": "none"})
    assert (said.code, "PEFT_SERVE_MAX_RANK: Input should be a valid integer" in said.all) == (2, True)
    assert "--max-rank: Input" in run("config", "show", "--max-rank", "0").all
    lists = run("config", "show", env={"PEFT_SERVE_ADAPTERS": "folder"})
    assert (lists.code, "PEFT_SERVE_ADAPTERS: a list is written as JSON" in lists.all) == (2, True)
    endless = run("config", "show", "--drain-s", "inf")
    assert (endless.code, "--drain-s: Input should be a finite number" in endless.all) == (2, True)
    file.write_text("port: 70000")
    assert run("serve", "--config", str(file)).code == 2, "a server reads the same file"


def test_show_tells_every_setting_and_its_place(file: Path) -> None:
    file.write_text("max_queue: 10\n")
    said = run("config", "show", "--sources", "--config", str(file), "--max-rows", "5")
    lines = {line.split()[0]: line.split() for line in said.out.splitlines() if line.strip()}
    assert lines["max_rows"][1:] == ["5", "flag", "--max-rows"]
    assert lines["max_queue"][1:] == ["10", "file", str(file)]
    assert lines["max_rank"][1:] == ["256", "default"]
    assert set(Settings.model_fields) <= set(lines)
    found = run("config", "show", "--sources", "--json", "--max-rows", "5").json
    assert found["max_rows"] == {"value": 5, "source": "flag", "place": "--max-rows"}
    assert run("config", "show", "--json", "some/base").json["model"] == "some/base"


def test_vllms_names_are_flags_and_keys() -> None:
    words = [word for name in VLLM_NAMES.values() for word in (f"--{name.replace('_', '-')}", _A_VALUE.get(name, "7"))]
    found = run("config", "show", "--json", *words)
    assert found.code == 0, found.err
    for ours, theirs in VLLM_NAMES.items():
        assert str(found.json[ours]) == _A_VALUE.get(theirs, "7"), theirs
        assert ours in Settings.model_fields
        assert theirs not in Settings.model_fields
        assert setting_named(theirs.replace("_", "-")) == ours
    help_text = run("serve", "--help", env={"COLUMNS": "300"}).all
    assert "[default: 256; env: PEFT_SERVE_MAX_RANK]" in help_text
    assert "torchao need peft-serve[quantised] [env: PEFT_SERVE_QUANTISATION]" in help_text
    assert "YAML file with settings [env: PEFT_SERVE_CONFIG]" in help_text
    assert all(f"--{name.replace('_', '-')}" in help_text for name in VLLM_NAMES.values())
    same = ("served_model_name", "dtype", "block_size", "max_model_len", "enable_prefix_caching", "host", "port")
    assert set(same) <= set(Settings.model_fields), "and these have one name on both sides"


_A_VALUE = {
    "quantization": "bnb-nf4", "uvicorn_log_level": "debug", "max_num_batched_tokens": "17",
    "kv_cache_memory_bytes": "1048577",
}  # fmt: skip


def test_the_nearest_name_may_be_vllms() -> None:
    assert nearest("max-num-seq") == "did you mean max_num_seqs?"


def test_completion_is_offered() -> None:
    said = run("--help")
    assert "--install-completion" in said.all
    assert {command.name for command in app.registered_commands} >= {"serve", "generate", "top", "bench", "doctor"}
