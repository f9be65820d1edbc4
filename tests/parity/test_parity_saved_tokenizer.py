"""A folder as training with transformers 5 leaves it, the tokenizer with its new tokens beside the adapter, served."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AddedToken, AutoTokenizer, PreTrainedTokenizerFast

from peft_serve.adapters.filesystem import DiskFileSystem
from peft_serve.adapters.folders import CheckpointFolders
from peft_serve.adapters.saved_tokenizer import KEPT_FILE, SAVED_FILE
from peft_serve.adapters.vocabulary import ADDED_FILE
from peft_serve.errors import AdapterUnavailable
from tests.adapters.checkpoints import make_checkpoint
from tests.parity.bases import lively_base
from tests.parity.served import ServedModel

NUM_WORDS = 60  # of the tokenizer; the embedding has 64 rows
CALL, END = "<call>", "<end>"
TEXT, PROMPT = f"t09 {CALL} t12 {END} t30", [9, 60, 12, 61, 30]


def tokenizer_of(num_words: int) -> Any:
    words = Tokenizer(models.WordLevel({f"t{i:02}": i for i in range(num_words)}, unk_token="t02"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="t00", eos_token="t01", unk_token="t02", bos_token="t03"
    )


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    model = lively_base("llama")
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 1, 0
    model.save_pretrained(folder)
    tokenizer_of(NUM_WORDS).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def served(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedModel]:
    with ServedModel(base_folder, tmp_path_factory.mktemp("store")) as running:
        yield running


def train(tokenizer: Any, folder: Path, change: Callable[[Any], None], method: str = "lora") -> Any:
    """What a training script does around its training; gives peft's model."""
    tokenizer.add_tokens([CALL])
    tokenizer.add_tokens([AddedToken(END, rstrip=True)], special_tokens=True)
    base = lively_base("llama")
    base.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64)
    _, model = make_checkpoint(method, "llama", base=base, change=change)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    assert (folder / SAVED_FILE).exists()
    return model


def rows(config: Any) -> None:
    config.trainable_token_indices = {"embed_tokens": [60, 61]}


def tables(config: Any) -> None:
    config.modules_to_save = ["embed_tokens", "lm_head"]


def packed(folder: Path, **more: bytes | None) -> bytes:
    """The folder as an archive of all its files, some exchanged or left out."""
    contents: dict[str, bytes | None] = {file.name: file.read_bytes() for file in folder.iterdir()}
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in {**contents, **more}.items():
            if content is not None:
                member = tarfile.TarInfo(f"checkpoint/{name}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def put(served: ServedModel, name: str, content: bytes, status: int = 201) -> dict[str, Any]:
    answer = served.client.put(f"/adapters/{name}", content=content, headers={"content-type": "application/gzip"})
    assert answer.status_code == status, answer.text
    found: dict[str, Any] = answer.json()
    return found


def generated(served: ServedModel, adapter: str, text: str = TEXT) -> dict[str, Any]:
    body = {"inputs": text, "parameters": {"max_new_tokens": 12, "details": True}}
    answer = served.client.post("/generate", params={"adapter": adapter}, json=body)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


@torch.no_grad()
def expected(model: Any, tokenizer: Any) -> tuple[list[int], str]:
    """Tokens and text after `TEXT`, through peft and the tokenizer that was trained with."""
    asked = tokenizer(TEXT, return_tensors="pt")
    assert asked["input_ids"][0].tolist() == PROMPT
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = model.generate(
            input_ids=asked["input_ids"], attention_mask=asked["attention_mask"], max_new_tokens=12, do_sample=False,
            eos_token_id=1, pad_token_id=0,
        )  # fmt: skip
    ids = made[0, len(PROMPT) :].tolist()
    return ids, tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize(("method", "change"), [("lora", rows), ("lora", tables), ("lora_dora", rows)])
def test_the_whole_folder_is_served_as_peft_runs_it(
    served: ServedModel, base_folder: Path, tmp_path: Path, method: str, change: Callable[[Any], None]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    model = train(tokenizer, tmp_path, change, method)
    assert not (tmp_path / ADDED_FILE).exists(), "transformers 5 writes none; the file would be read as well"
    before = generated(served, "base")
    made = put(served, "trained", packed(tmp_path))
    assert [text for text in made["warnings"] if "README" not in text and "special_tokens_map" not in text] == []
    found, (ids, text) = generated(served, "trained"), expected(model, tokenizer)
    assert found["details"]["prompt_tokens"] == len(PROMPT)
    assert [token["id"] for token in found["details"]["tokens"]] == ids
    assert found["generated_text"].split() == text.split()
    assert generated(served, "base") == before, "to the base they are unknown words"
    listed = served.client.post("/tokenize", params={"adapter": "trained"}, json={"inputs": TEXT}).json()
    assert [token["id"] for token in listed] == PROMPT


def test_a_tokenizer_of_other_words_is_refused_by_name(served: ServedModel, tmp_path: Path) -> None:
    other = tokenizer_of(NUM_WORDS)
    rotated = json.loads(other.backend_tokenizer.to_str())
    rotated["model"]["vocab"] = {f"t{i:02}": (i + 1) % NUM_WORDS for i in range(NUM_WORDS)}
    for token in rotated["added_tokens"]:
        token["id"] = rotated["model"]["vocab"][token["content"]]
    train(tokenizer_of(NUM_WORDS), tmp_path, rows)
    refused = put(served, "strange", packed(tmp_path, **{SAVED_FILE: json.dumps(rotated).encode()}), status=422)
    assert refused["errors"][0]["path"] == f"{SAVED_FILE}: model.vocab"
    assert "leave the file out" in refused["errors"][0]["reason"]
    assert put(served, "strange", packed(tmp_path, **{SAVED_FILE: None}))["name"] == "strange"


def test_a_tokenizer_of_more_words_has_its_tokens_in_the_wrong_place(served: ServedModel, tmp_path: Path) -> None:
    train(tokenizer_of(NUM_WORDS + 1), tmp_path, rows)
    refused = put(served, "longer", packed(tmp_path), status=422)
    assert refused["errors"][0]["path"] == f"{SAVED_FILE}: model.vocab"


def test_a_token_that_leaves_a_gap_is_named_with_its_file(served: ServedModel, tmp_path: Path) -> None:
    train(tokenizer_of(NUM_WORDS), tmp_path, rows)
    saved = json.loads((tmp_path / SAVED_FILE).read_bytes())
    (call,) = (token for token in saved["added_tokens"] if token["content"] == CALL)
    call["id"] = 63
    refused = put(served, "gap", packed(tmp_path, **{SAVED_FILE: json.dumps(saved).encode()}), status=422)
    assert refused["errors"][0]["path"] == f"{SAVED_FILE}: '{END}'"
    assert "where 60 is due" in refused["errors"][0]["reason"]


def test_a_tokenizer_that_adds_nothing_changes_nothing(served: ServedModel, base_folder: Path, tmp_path: Path) -> None:
    _, model = make_checkpoint("lora", "llama", base=lively_base("llama"))
    model.save_pretrained(tmp_path)
    put(served, "bare", packed(tmp_path))
    AutoTokenizer.from_pretrained(base_folder).save_pretrained(tmp_path)
    put(served, "beside", packed(tmp_path))
    both = [generated(served, name)["details"]["tokens"] for name in ("bare", "beside")]
    assert both[0] == both[1]


def test_a_broken_tokenizer_is_a_malformed_upload(served: ServedModel, tmp_path: Path) -> None:
    train(tokenizer_of(NUM_WORDS), tmp_path, rows)
    refused = put(served, "broken", packed(tmp_path, **{SAVED_FILE: b"{"}), status=400)
    assert SAVED_FILE in refused["detail"]


def test_it_is_kept_over_a_restart_and_read_from_folders(base_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folders" / "lying"
    tokenizer = tokenizer_of(NUM_WORDS)
    model = train(tokenizer, folder, rows)
    with ServedModel(base_folder, tmp_path / "store", adapters=[tmp_path / "folders"]) as served:
        digest = put(served, "kept", packed(folder))["digest"]
    ids, _ = expected(model, tokenizer)
    shutil.copytree(tmp_path / "store", tmp_path / "moved")  # its lock lives as long as the first server's parts
    with ServedModel(base_folder, tmp_path / "moved", adapters=[tmp_path / "folders"]) as served:
        for name in ("kept", "lying"):
            assert [token["id"] for token in generated(served, name)["details"]["tokens"]] == ids
    blob = next((tmp_path / "store").rglob(KEPT_FILE))
    assert not list((tmp_path / "store").rglob(SAVED_FILE)), "the tokenizer itself is not stored"
    assert blob.stat().st_size < 1000
    folders = CheckpointFolders([tmp_path / "folders"], DiskFileSystem(), base_name="base")
    assert folders.read("lying")[1].digest() == digest
    (folder / SAVED_FILE).write_bytes(b"[]")
    with pytest.raises(AdapterUnavailable, match=r"'lying'.*tokenizer\.json"):
        folders.read("lying")
