"""`peft-serve doctor --adapter`: mistakes planted in a checkpoint, with and without a base beside it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from peft_serve.adapters.records import CheckpointFiles
from peft_serve.commands.checkup.adapter import look_at_adapter
from peft_serve.commands.checkup.finding import State, is_healthy
from peft_serve.config import Settings
from tests.adapters.checkpoints import make_checkpoint
from tests.commands.checkup_fakes import bad, found
from tests.commands.conftest import run, write_checkpoint
from tests.conftest import REPOSITORY
from tests.parity.bases import save_tiny_base


def spoil(folder: Path, mistake: str) -> None:
    """Plant one mistake in a good checkpoint."""
    config_file, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    config = json.loads(config_file.read_text())
    tensors = load_file(weights)
    first = next(iter(tensors))
    match mistake:
        case "no config":
            config_file.unlink()
        case "no weights":
            weights.unlink()
        case "pickle":
            weights.rename(folder / "adapter_model.bin")
        case "renamed pickle":
            weights.write_bytes(b"PK\x03\x04" + bytes(64))
        case "pointer":
            weights.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
        case "cut":
            weights.write_bytes(weights.read_bytes()[:-8])
        case "NaN":
            save_file(tensors | {first: torch.full_like(tensors[first], float("nan"))}, weights)
        case "json":
            config_file.write_text("{'r': 8}")
        case "type":
            config_file.write_text(json.dumps(config | {"peft_type": "XLORA"}))
        case "rank":
            config_file.write_text(json.dumps(config | {"r": 1000}))
        case "profile":
            (folder / "peft_serve.json").write_text('{"template": "no place for the text"}')
        case "tensor":
            tensors.pop(first)
            save_file(tensors, weights)
        case "foreign":
            save_file(tensors | {"base_model.model.nowhere.lora_A.weight": torch.zeros(4, 4)}, weights)


MISTAKES = [
    ("no config", ("adapter_config.json", "save_pretrained")),
    ("no weights", ("adapter_model.safetensors", "save_pretrained")),
    ("pickle", ("adapter_model.bin", "safe_serialization=True")),
    ("renamed pickle", ("pickle", "safe_serialization=True")),
    ("pointer", ("git-lfs pointer", "git lfs pull")),
    ("cut", ("shape and bytes that disagree", "save it again")),
    ("NaN", ("NaN", "from before")),
    ("json", ("adapter_config.json",)),
    ("type", ("peft_type", "XLORA", "upload the adapters that it mixes")),
    ("rank", ("1000", "--max-rank")),
    ("profile", ("peft_serve.json", "{text}")),
]
NEED_A_BASE = [("tensor", ("is missing", "save the checkpoint again")), ("foreign", ("nowhere",))]


@pytest.fixture(scope="module")
def saved_lora() -> CheckpointFiles:
    return make_checkpoint("lora", "llama")[0]


@pytest.fixture
def lora(saved_lora: CheckpointFiles, tmp_path: Path) -> Path:
    """A good checkpoint of one's own to spoil."""
    return write_checkpoint(tmp_path / "my-lora", saved_lora.contents())


def test_a_good_adapter_has_nothing_wrong(lora: Path, base: Path) -> None:
    assert bad(look_at_adapter(lora, Settings())) == []
    findings = list(look_at_adapter(lora, Settings(), base=str(base)))
    assert all(each.state is not State.WRONG for each in findings)
    assert "LORA of rank" in findings[0].fact


@pytest.mark.parametrize(("mistake", "words"), MISTAKES, ids=[name for name, _ in MISTAKES])
def test_a_planted_mistake_is_found(lora: Path, mistake: str, words: tuple[str, ...]) -> None:
    spoil(lora, mistake)
    found(look_at_adapter(lora, Settings()), *words)


@pytest.mark.parametrize(("mistake", "words"), NEED_A_BASE, ids=[name for name, _ in NEED_A_BASE])
def test_what_only_a_base_shows(lora: Path, base: Path, mistake: str, words: tuple[str, ...]) -> None:
    spoil(lora, mistake)
    assert bad(look_at_adapter(lora, Settings())) == []
    texts = " ".join(
        bad(each for each in look_at_adapter(lora, Settings(), base=str(base)) if each.state is State.WRONG)
    )
    assert all(word in texts for word in words), texts


def test_copies_of_weights_are_left_to_a_server_that_has_them(lora: Path, base: Path) -> None:
    weights = lora / "adapter_model.safetensors"
    embedding = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    save_file(load_file(weights) | {"base_model.model.model.embed_tokens.weight": embedding}, weights)
    found(look_at_adapter(lora, Settings(), base=str(base)), "only the base's own values", state=State.ODD)


def test_an_adapter_of_another_base(lora: Path, tmp_path: Path) -> None:
    save_tiny_base("gpt2", tmp_path / "other")
    findings = list(look_at_adapter(lora, Settings(), base=str(tmp_path / "other")))
    assert not is_healthy(findings)


def test_a_name_that_no_adapter_can_have_and_a_place_beside_it(lora: Path, tmp_path: Path) -> None:
    odd_name = lora.rename(tmp_path / "my lora")
    found(look_at_adapter(odd_name, Settings()), "a name is 1 to 64 letters", state=State.ODD)
    (tmp_path / "around").mkdir()
    odd_name.rename(tmp_path / "around" / "inner")
    found(look_at_adapter(tmp_path / "around", Settings()), "did you mean", "inner")
    found(look_at_adapter(tmp_path / "typo", Settings()), "cannot be read")


def test_the_command_looks_at_all_that_is_named(lora: Path, base: Path) -> None:
    said = run("doctor", "--base", str(base), "--adapter", str(lora), "--json")
    assert (said.code, said.json["healthy"]) == (0, True)
    spoil(lora, "NaN")
    said = run("doctor", "--adapter", str(lora))
    assert said.code == 1
    assert "✗" in said.out
    assert "1 wrong, 0 to look at" in said.out


def test_what_adapterhub_saved_is_read_too() -> None:
    folder = REPOSITORY / "tests" / "adapters" / "adapterhub" / "golden" / "llama" / "prefix"
    findings = list(look_at_adapter(folder, Settings()))
    assert bad(findings) == []
    assert "ADAPTERHUB" in findings[0].fact
