"""Adapters with words of their own, over HTTP on a real base: its tokens, its template, and who is refused."""

from __future__ import annotations

import io
import json
import shutil
import warnings
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from peft_serve.adapters.filesystem import DiskFileSystem
from peft_serve.adapters.folders import CheckpointFolders
from peft_serve.adapters.records import CheckpointFiles
from peft_serve.adapters.vocabulary import ADDED_FILE, TEMPLATE_FILE, TOKENIZER_FILE
from tests.adapters.checkpoints import make_checkpoint
from tests.parity.bases import lively_base
from tests.parity.served import ServedModel

NUM_WORDS = 60  # of the tokenizer; the embedding has 64 rows
CALL, END = "<call>", "<end>"
TEMPLATE = "{% for m in messages %}" + CALL + " {{ m.content }} {% endfor %}t59"
CHAT = {"model": "base", "messages": [{"role": "user", "content": "t09 t30"}], "temperature": 0, "max_tokens": 8}


def tokens(**more: Any) -> dict[str, bytes]:
    """The files of a tokenizer with two tokens more than the base's."""
    decoder = {"60": {"content": CALL, "special": False}, "61": {"content": END, "special": True}}
    return {TOKENIZER_FILE: json.dumps({"added_tokens_decoder": decoder, **more}).encode()}


def template(text: str = TEMPLATE) -> dict[str, bytes]:
    return {TEMPLATE_FILE: text.encode()}


def zipped(files: CheckpointFiles, more: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in {**files.contents(), **more}.items():
            archive.writestr(f"checkpoint/{name}", content)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    model = lively_base("llama")
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 1, 0
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"t{i:02}": i for i in range(NUM_WORDS)}, unk_token="t02"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="t00", eos_token="t01", unk_token="t02", bos_token="t03"
    )
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def trained() -> tuple[CheckpointFiles, Any]:
    """A LoRA that also trains the rows of the two new tokens."""

    def change(config: Any) -> None:
        config.trainable_token_indices = {"embed_tokens": [60, 61]}

    return make_checkpoint("lora", "llama", base=lively_base("llama"), change=change)


@pytest.fixture(scope="module")
def plain() -> CheckpointFiles:
    return make_checkpoint("lora", "llama", seed=5, base=lively_base("llama"))[0]


@pytest.fixture(scope="module")
def strict(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedModel]:
    with ServedModel(base_folder, tmp_path_factory.mktemp("strict")) as served:
        yield served


@pytest.fixture(scope="module")
def open_minded(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedModel]:
    with ServedModel(base_folder, tmp_path_factory.mktemp("open"), allow_chat_templates=True) as served:
        yield served


def put(served: ServedModel, name: str, content: bytes, status: int = 201) -> dict[str, Any]:
    answer = served.client.put(f"/adapters/{name}", content=content, headers={"content-type": "application/zip"})
    assert answer.status_code == status, answer.text
    found: dict[str, Any] = answer.json()
    return found


def generated(served: ServedModel, text: str, adapter: str = "base", **parameters: Any) -> dict[str, Any]:
    body = {"inputs": text, "parameters": {"max_new_tokens": 12, "details": True, **parameters}}
    answer = served.client.post("/generate", params={"adapter": adapter}, json=body)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


@torch.no_grad()
def oracle(model: Any, prompt: list[int]) -> list[int]:
    ids = torch.tensor([prompt])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, eos_token_id=1,
            pad_token_id=0,
        )  # fmt: skip
    return [int(i) for i in made[0, len(prompt) :]]


def test_added_tokens_are_read_and_answered_as_peft_does(strict: ServedModel, trained: Any) -> None:
    files, model = trained
    text, prompt = f"t09 {CALL} t12 {END}", [9, 60, 12, 61]
    before = generated(strict, text)
    assert put(strict, "caller", zipped(files, tokens()))["warnings"] == []
    found = generated(strict, text, "caller")
    assert [token["id"] for token in found["details"]["tokens"]] == oracle(model, prompt)
    assert found["details"]["prompt_tokens"] == 4
    assert generated(strict, text) == before, "to the base they are unknown words"
    listed = strict.client.post("/tokenize", params={"adapter": "caller"}, json={"inputs": text}).json()
    assert [token["id"] for token in listed] == prompt
    listed = strict.client.post("/tokenize", json={"inputs": text}).json()
    assert [token["id"] for token in listed] == [9, 2, 12, 2]


def test_choices_and_streams_speak_the_new_tokens(strict: ServedModel, trained: Any) -> None:
    put(strict, "streaming", zipped(trained[0], tokens()))
    scored = generated(strict, "t09", "streaming", choices=[CALL, "t12"])
    assert {choice["label"] for choice in scored["details"]["choices"]} == {CALL, "t12"}
    assert scored["details"]["tokens"][0]["id"] in (60, 12)
    whole = generated(strict, CALL, "streaming")
    body = {"inputs": CALL, "parameters": {"max_new_tokens": 12}}
    with strict.client.stream("POST", "/generate_stream", params={"adapter": "streaming"}, json=body) as answer:
        lines = [json.loads(line[5:]) for line in answer.iter_lines() if line.startswith("data:")]
    assert lines[-1]["generated_text"] == whole["generated_text"]


def test_an_end_of_sequence_of_its_own_ends_an_answer(strict: ServedModel, trained: Any) -> None:
    files, model = trained
    own = {60: CALL, 61: END}
    answers = {i: oracle(model, [i, 30]) for i in range(4, NUM_WORDS)}
    prompt, made = next((i, made) for i, made in answers.items() if own.keys() & set(made[1:-1]))
    at, end = next((at, i) for at, i in enumerate(made) if i in own)
    put(strict, "endless", zipped(files, tokens()))
    put(strict, "ending", zipped(files, tokens(eos_token=own[end])))
    details = [generated(strict, f"t{prompt:02} t30", name)["details"] for name in ("endless", "ending")]
    assert [[token["id"] for token in each["tokens"]] for each in details] == [made, made[: at + 1]]
    assert details[1]["finish_reason"] == "eos_token"
    assert details[1]["tokens"][-1]["special"]


def test_an_id_that_the_base_cannot_have_is_refused_by_name(strict: ServedModel, plain: CheckpointFiles) -> None:
    for added, reason in (
        ({"t05": 6}, "has it as 5"),
        ({CALL: 5}, "is 't05'"),
        ({CALL: 62}, "where 60 is due"),
    ):
        refused = put(strict, "odd", zipped(plain, {ADDED_FILE: json.dumps(added).encode()}), status=422)
        assert refused["code"] == "adapter_invalid"
        assert reason in refused["errors"][0]["reason"]
        assert refused["errors"][0]["path"].startswith(ADDED_FILE)


def test_tokens_without_a_row_are_told_and_not_used(strict: ServedModel, plain: CheckpointFiles) -> None:
    """Many an adapter was saved beside a tokenizer with a padding token beyond the embedding."""
    files = {ADDED_FILE: json.dumps({"[PAD]": 64, CALL: 60}).encode()}
    made = put(strict, "padded", zipped(plain, files))
    assert any("[PAD]" in text and "64 rows" in text for text in made["warnings"])
    ids = strict.client.post("/tokenize", params={"adapter": "padded"}, json={"inputs": f"t05 {CALL} [PAD]"}).json()
    assert [token["id"] for token in ids] == [5, 60, 2]


def test_files_that_are_too_large_are_refused(strict: ServedModel, plain: CheckpointFiles) -> None:
    refused = put(strict, "long", zipped(plain, template("x" * 65537)), status=413)
    assert TEMPLATE_FILE in refused["detail"]


def test_a_form_carries_the_same_files(strict: ServedModel, plain: CheckpointFiles) -> None:
    more = {**tokens(), **template()}
    parts = [("files", (name, content)) for name, content in {**plain.contents(), **more}.items()]
    found = strict.client.post("/adapters/validate", files=parts).json()
    assert found["digest"] == replace(plain, vocabulary=more).digest()
    assert found["digest"] != plain.digest()


def test_without_leave_a_template_is_taken_and_not_used(strict: ServedModel, plain: CheckpointFiles) -> None:
    put(strict, "mute", zipped(plain, {}))
    warned = put(strict, "templated", zipped(plain, template()))["warnings"]
    assert any("--allow-chat-templates" in text and TEMPLATE_FILE in text for text in warned)
    answers = [strict.client.post("/v1/chat/completions", json={**CHAT, "model": m}) for m in ("mute", "templated")]
    assert answers[0].json()["choices"] == answers[1].json()["choices"]
    assert answers[1].json()["usage"]["prompt_tokens"] == 2


def test_with_leave_an_adapters_template_puts_its_chats(open_minded: ServedModel, trained: Any) -> None:
    files, model = trained
    before = open_minded.client.post("/v1/chat/completions", json=CHAT).json()
    assert put(open_minded, "chatty", zipped(files, {**tokens(), **template()}))["warnings"] == []
    answer = open_minded.client.post("/v1/chat/completions", json={**CHAT, "model": "chatty"}).json()
    assert answer["usage"]["prompt_tokens"] == 4
    expected = oracle(model, [60, 9, 30, 59])[:8]
    own = {60: CALL}
    words = [own.get(i, f"t{i:02}") for i in expected if i > 3 and i != 61]
    assert answer["choices"][0]["message"]["content"].split() == words
    after = open_minded.client.post("/v1/chat/completions", json=CHAT).json()
    assert after["choices"] == before["choices"], "the base is asked in its own way"


def test_a_template_that_refuses_is_named_and_harms_nobody(open_minded: ServedModel, plain: CheckpointFiles) -> None:
    for name, text, reason in (
        ("picky", "{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("nosy", "{{ ''.__class__.__mro__ }}", "unsafe"),
        ("busy", "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "more than 2 s"),
    ):
        put(open_minded, name, zipped(plain, template(text)))
        answer = open_minded.client.post("/v1/chat/completions", json={**CHAT, "model": name})
        assert answer.status_code == 400
        message = answer.json()["error"]["message"]
        assert f"the chat template of adapter '{name}'" in message
        assert reason in message
        assert open_minded.client.post("/v1/chat/completions", json=CHAT).status_code == 200
    refused = put(open_minded, "broken", zipped(plain, template("{% for")), status=422)
    assert refused["errors"][0]["path"] == TEMPLATE_FILE


def test_adapters_with_different_words_are_not_combined(
    open_minded: ServedModel, plain: CheckpointFiles, trained: Any
) -> None:
    put(open_minded, "one", zipped(plain, template("one {{ messages[0].content }}")))
    put(open_minded, "two", zipped(trained[0], tokens()))
    put(open_minded, "none", zipped(make_checkpoint("lora", "llama", seed=9, base=lively_base("llama"))[0], {}))
    body = {"inputs": f"{CALL} t09", "parameters": {"max_new_tokens": 2}}
    refused = open_minded.client.post("/generate", params={"adapter": "one+two"}, json=body)
    assert refused.status_code == 422
    assert "one and two bring different" in refused.json()["detail"]
    assert open_minded.client.post("/generate", params={"adapter": "one+none"}, json=body).status_code == 200


def test_words_are_kept_over_a_restart_and_read_from_folders(
    base_folder: Path, tmp_path: Path, trained: Any, plain: CheckpointFiles
) -> None:
    text, more = f"t09 {CALL}", tokens()
    files = replace(trained[0], vocabulary=more)
    folder = tmp_path / "folders" / "lying"
    folder.mkdir(parents=True)
    for name, content in files.contents().items():
        (folder / name).write_bytes(content)
    with ServedModel(base_folder, tmp_path / "store", adapters=[tmp_path / "folders"]) as served:
        assert put(served, "kept", zipped(trained[0], more))["digest"] == files.digest()
        first = generated(served, text, "kept")
        assert first["details"]["prompt_tokens"] == 2
    shutil.copytree(tmp_path / "store", tmp_path / "moved")
    with ServedModel(base_folder, tmp_path / "moved", adapters=[tmp_path / "folders"]) as served:
        for name in ("kept", "lying"):
            again = generated(served, text, name)
            assert again["details"]["tokens"] == first["details"]["tokens"]
        generated(served, text, "lying@sha256:" + files.digest().removeprefix("sha256:"))
    folders = CheckpointFolders([tmp_path / "folders"], DiskFileSystem(), base_name="base")
    assert folders.read("lying")[1] == files
    assert plain.digest() != replace(plain, vocabulary=more).digest()
