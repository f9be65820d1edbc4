"""`peft-serve doctor --base`: mistakes planted in a base, on a disk and on the hub."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import httpx
import pytest
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from safetensors.torch import load_file, save_file

from peft_serve.commands.checkup.base import look_at_base
from peft_serve.commands.checkup.finding import Finding, State
from peft_serve.commands.checkup.machine import Machine
from peft_serve.config import Settings
from tests.commands.checkup_fakes import GoodMachine, bad, found


def look(base: Path | str, machine: Machine | None = None, **settings: Any) -> list[Finding]:
    return list(look_at_base(str(base), machine or GoodMachine(), Settings(**settings)))


def test_a_whole_base_has_nothing_wrong(base: Path) -> None:
    findings = look(base)
    assert bad(findings) == []
    assert {each.place for each in findings} == {"family", "weights", "tokenizer", "memory"}


def test_a_folder_that_is_not_there_or_is_no_base(tmp_path: Path, base: Path) -> None:
    found(look(tmp_path / "typo"), "no such folder", "check the path")
    (base / "adapter_config.json").write_text("{}")
    found(look(base), "is an adapter", "serve its base")


def test_a_configuration_that_says_nothing(base: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text("{")
    found(look(base), "config.json", "no configuration can be read")
    (base / "config.json").write_text(json.dumps(config | {"model_type": "not_yet_made"}))
    found(look(base), "not_yet_made", "own code are not run")
    (base / "config.json").unlink()
    assert len(bad(look(base))) == 1


def test_weights_that_are_missing_cut_short_or_no_safetensors(base: Path) -> None:
    file = base / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    found(look(base), "model.safetensors", "cut short", "download it again")
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    found(look(base), "git-lfs pointer", "git lfs pull")
    file.write_bytes(b"PK\x03\x04" + bytes(99))
    found(look(base), "is no safetensors file but a pickle", "save_pretrained")
    file.write_bytes(bytes(range(250)) * 4)
    found(look(base), "has 1000 B that are no safetensors file: it is damaged or cut short", "download it again")
    assert not [each for each in look(base) if "save_pretrained" in f"{each}"]
    file.write_bytes(struct.pack("<Q", 9) + b"{not json" + bytes(9))
    found(look(base), "header that cannot be read")
    file.unlink()
    found(look(base), "1 of 1 files are missing")
    (base / "pytorch_model.bin").write_bytes(b"")
    found(look(base), "are pickles (pytorch_model.bin)", "safetensors")


def test_a_shard_that_did_not_come(base: Path) -> None:
    tensors = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    names = sorted(tensors)
    halves = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, half in halves.items():
        save_file({name: tensors[name] for name in half}, base / file)
    placed = {name: file for file, half in halves.items() for name in half}
    index = base / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    assert bad(look(base)) == []
    index.write_text(json.dumps({"weight_map": placed | {"model.more": "model-00001-of-00002.safetensors"}}))
    found(look(base), "1 that the index names are in no file, model.more")
    index.write_text(json.dumps({"weight_map": placed}))
    (base / "model-00002-of-00002.safetensors").unlink()
    found(look(base), "1 of 2 files are missing", "interrupted download")
    index.write_text("[]")
    found(look(base), "model.safetensors.index.json", "cannot be read")


def test_tokenizer_context_and_memory_of_a_base(base: Path) -> None:
    found(look(base, GoodMachine(free_memory=1000)), "memory", "parameters take", "--dtype bfloat16")
    found(look(base, max_model_len=1 << 20), "--max-model-len", "positions of the base", state=State.ODD)
    found(look(base, device="cuda"), "--device", "--device cpu")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (base / name).unlink()
    found(look(base), "tokenizer", "has none", "save_pretrained")
    (base / "tokenizer.json").write_text("{")
    found(look(base), "tokenizer", "cannot be read")


class Sibling:
    def __init__(self, name: str) -> None:
        self.rfilename = name


class Repository:
    def __init__(self, *files: str) -> None:
        self.siblings = [Sibling(name) for name in files]


def test_a_base_on_the_hub_is_asked_for_and_not_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(answer: Any) -> list[Finding]:
        def hub(source: str) -> Any:
            if isinstance(answer, Exception):
                raise answer
            return answer

        return list(look_at_base("org/model", GoodMachine(), Settings(), hub=hub, cached=lambda _: None))

    found(ask(None), "HF_HUB_OFFLINE", "hf download")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    assert bad(ask(Repository("config.json", "model.safetensors"))) == []
    found(ask(Repository("config.json", "pytorch_model.bin")), "no safetensors", "save_pretrained")
    found(ask(Repository("adapter_config.json", "adapter_model.safetensors")), "is an adapter")
    found(ask(Repository("README.md")), "no config.json")
    response = httpx.Response(403, request=httpx.Request("GET", "http://hub"))
    found(ask(GatedRepoError("gated", response=response)), "gated", "HF_TOKEN")
    found(ask(RepositoryNotFoundError("no", response=response)), "neither a folder here nor a model on the hub")
    found(ask(OSError("no route")), "hub cannot be asked", state=State.ODD)
    found(ask(httpx.ConnectError("no such name")), "hub cannot be asked about it: no such name", state=State.ODD)


def test_a_base_that_was_downloaded_is_looked_at_where_it_lies(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ask() -> list[Finding]:
        def hub(source: str) -> Any:
            return Repository("config.json", "model.safetensors")

        return list(look_at_base("org/model", GoodMachine(), Settings(), hub=hub, cached=lambda _: base))

    assert {each.place for each in ask()} == {"family", "weights", "tokenizer", "memory"}
    (base / "model.safetensors").unlink()
    found(ask(), "1 of 1 files are missing")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    assert bad(ask()) == [], "what is missing can be downloaded"
    not_cached = look_at_base("org/never-there", GoodMachine(), Settings(), hub=lambda _: Repository("config.json"))
    found(not_cached, "org/never-there has no safetensors")
