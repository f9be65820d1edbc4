"""`peft-serve adapters verify`: what it finds, what it says, and how it ends."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from peft_serve.adapters.filesystem import DiskFileSystem
from peft_serve.adapters.records import CONFIG_FILE, WEIGHTS_FILE, CheckpointFiles
from peft_serve.adapters.shared.object_bucket import ObjectBucket
from peft_serve.config import Settings
from peft_serve.engine.adapter_places import open_store
from peft_serve.errors import UnknownAdapter
from peft_serve.verify.checkpoint import find_checkpoint
from peft_serve.verify.command import _table, app
from peft_serve.verify.report import Answer, Comparison, verdict
from tests.adapters.checkpoints import make_checkpoint
from tests.adapters.shared.object_services import environment, object_service
from tests.adapters.shared.shared_fakes import catalog_over
from tests.adapters.store.store_fakes import FakeGate, checkpoint, tree
from tests.parity.bases import lively_base, save_tiny_base
from tests.parity.served import ServedModel
from tests.parity.test_parity_http import as_zip

NARROW = {"COLUMNS": "200"}


def compared(
    expected: tuple[int, ...], served: tuple[int, ...], base: tuple[int, ...] = (9,), text: str = "a prompt"
) -> Comparison:
    def answer(tokens: tuple[int, ...]) -> Answer:
        return Answer(tokens=tokens, logprobs=tuple(-0.1 * t for t in tokens))

    return Comparison(text=text, expected=answer(expected), served=answer(served), base=answer(base))


def test_shipped_adapter_equals_peft() -> None:
    result = CliRunner().invoke(app, ["verify", "twitter-complaints", "--max-new-tokens", "4"], env=NARROW)
    assert result.exit_code == 0, result.output
    assert "equal: all 4 answers equal peft's" in result.output


def test_folder_on_a_base_of_ones_own(tmp_path: Path) -> None:
    """The whole way for a checkpoint nobody has uploaded, with prompts that are given."""
    save_tiny_base("gpt2", tmp_path / "base")
    files, _ = make_checkpoint("lora_dora", "gpt2", seed=5, base=lively_base("gpt2"))
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / CONFIG_FILE).write_bytes(files.config)
    (folder / WEIGHTS_FILE).write_bytes(files.weights)
    words = ["--prompt", "t09 t30 [/t12]", "--prompt", "t17 t08", "--model", str(tmp_path / "base"), "--json"]
    result = CliRunner().invoke(app, ["verify", str(folder), *words], env=NARROW)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["equal"], "all 2 answers equal" in found["verdict"]) == (True, True)
    assert [each["prompt"] for each in found["prompts"]] == ["t09 t30 [/t12]", "t17 t08"]
    assert all(each["equal"] and each["differs_from_base"] and each["largest_gap"] < 1e-3 for each in found["prompts"])


def test_what_is_shown_is_text_and_no_markup() -> None:
    console = Console(file=io.StringIO(), width=200)
    console.print(_table([compared((1,), (1,), text="say [/b] and [red]")]))
    assert isinstance(console.file, io.StringIO)
    assert "say [/b] and [red]" in console.file.getvalue()


def test_unknown_name_says_where_it_looked(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["verify", "nobody", "--store", str(tmp_path)], env=NARROW)
    assert result.exit_code == 2
    assert "nobody" in result.output
    assert "--store" in result.output
    told = CliRunner().invoke(app, ["verify", "nobody", "--store", str(tmp_path), "--json"], env=NARROW)
    assert (told.exit_code, json.loads(told.stdout)["error"]["code"]) == (2, "not_verified")


def test_reads_a_store_that_a_server_owns(tmp_path: Path) -> None:
    save_tiny_base("llama", tmp_path / "base")
    files, _ = make_checkpoint("lora", "llama", base=lively_base("llama"))
    with ServedModel(tmp_path / "base", tmp_path / "store") as served:
        uploaded = served.client.put(
            "/adapters/mine", content=as_zip(files), headers={"content-type": "application/zip"}
        )
        assert uploaded.status_code == 201
        found = find_checkpoint("mine", store=tmp_path / "store", folders=(), base_name="base", fs=DiskFileSystem())
        assert found.digest() == uploaded.json()["digest"]
        with pytest.raises(UnknownAdapter):
            find_checkpoint("other", store=tmp_path / "store", folders=(), base_name="base", fs=DiskFileSystem())


@pytest.fixture
def _bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`s3://bucket` is there."""
    with object_service() as address:
        for variable, value in environment(address).items():
            monkeypatch.setenv(variable, value)
        yield


@pytest.mark.parametrize("kind", ["folder", "objects"])
def test_reads_a_store_that_servers_share_and_leaves_it_as_it_is(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if kind == "folder":
        settings = Settings(store=str(tmp_path / "store"), store_shared=True)
    else:
        settings = Settings(store=f"s3://bucket/{tmp_path.name}")
        request.getfixturevalue("_bucket")
    store = open_store(settings, tmp_path / "store")
    catalog = catalog_over(store, FakeGate())
    for seed in (1, 2):
        catalog.changes.publish("mine", checkpoint(seed))
    catalog.changes.publish("gone", checkpoint(3))
    catalog.changes.delete("gone")
    place = settings.store
    assert place is not None

    def there() -> object:
        return tree(tmp_path / "store") if kind == "folder" else ObjectBucket.at(place).tags("")

    def found(name: str) -> CheckpointFiles:
        return find_checkpoint(name, store=place, folders=(), base_name="base", fs=DiskFileSystem())

    before = there()
    assert found("mine") == checkpoint(2)
    for name in ("gone", "never"):
        with pytest.raises(UnknownAdapter, match=r"store|s3://"):
            found(name)
    assert there() == before


@pytest.mark.usefixtures("_bucket")
def test_a_bucket_that_is_not_there_is_named() -> None:
    result = CliRunner().invoke(app, ["verify", "mine", "--store", "s3://nowhere/x"], env=NARROW)
    assert result.exit_code == 2
    assert "--store s3://nowhere/x: there is no such bucket" in result.output


def test_verdict_tells_equal_from_different_and_idle() -> None:
    is_equal, sentence = verdict([compared((1, 2), (1, 2)), compared((3,), (4,))])
    assert not is_equal
    assert "1 of 2 answers differ" in sentence
    is_equal, sentence = verdict([compared((1, 2), (1, 2))])
    assert is_equal
    assert "changes nothing" not in sentence
    is_equal, sentence = verdict([compared((9,), (9,))])
    assert is_equal
    assert "changes nothing" in sentence


def test_one_task_of_several(tmp_path: Path) -> None:
    save_tiny_base("llama", tmp_path / "base")
    files, _ = make_checkpoint("poly", "llama", seed=5, base=lively_base("llama"))
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / CONFIG_FILE).write_bytes(files.config)
    (folder / WEIGHTS_FILE).write_bytes(files.weights)
    asked = ["verify", str(folder), "--model", str(tmp_path / "base"), "--prompt", "t09 t30 t12"]
    result = CliRunner().invoke(app, [*asked, "--task-id", "1"], env=NARROW)
    assert result.exit_code == 0, result.output
    unsaid = CliRunner().invoke(app, asked, env=NARROW)
    assert unsaid.exit_code == 2
    assert "task_id" in unsaid.output
