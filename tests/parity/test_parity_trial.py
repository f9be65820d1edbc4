"""Uploads to real engines over tiny bases: what works is tried in silence, what does nothing or overflows is told."""

from __future__ import annotations

import io
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import peft
import pytest
import torch
from safetensors.torch import load

from peft_serve.adapters.records import HUB_WEIGHTS_FILE, WEIGHTS_FILE, CheckpointFiles
from tests.adapters.adapterhub.bases import SEQ2SEQ as HUB_SEQ2SEQ
from tests.adapters.adapterhub.bases import base_model
from tests.adapters.adapterhub.served import files_of, forms_of, heads_of
from tests.adapters.checkpoints import SEQ2SEQ, make_checkpoint, save
from tests.model.tiny_encoders import tiny_encoder
from tests.parity.bases import lively_base, save_tiny_base, word_codec
from tests.parity.reading_oracle import adapted
from tests.parity.served import ServedModel

ANYWHERE = ("lora", "lora_dora", "lora_head", "lora_embedding", "ia3", "ln_tuning", "prompt_tuning", "prefix_tuning")
METHODS = {
    "llama": (*ANYWHERE, "lora_tokens", "trainable_tokens", "lora_activated", "poly", "multitask_prompt_tuning"),
    "gpt2": (*ANYWHERE, "lora_tokens", "trainable_tokens"),
    "t5": (*ANYWHERE, "multitask_prompt_tuning"),
}
NOTHING = "changes nothing"


def upload(
    client: httpx.Client, name: str, files: CheckpointFiles, *, weights_file: str = WEIGHTS_FILE, **query: int
) -> httpx.Response:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for file, content in files.contents().items():
            archive.writestr(weights_file if file == WEIGHTS_FILE else file, content)
    headers = {"content-type": "application/zip"}
    return client.put(f"/adapters/{name}", content=buffer.getvalue(), headers=headers, params=query)


def told(answer: httpx.Response) -> list[str]:
    """The warnings of a trial in the answer to an upload that was kept."""
    assert answer.status_code == 201, answer.text
    assert answer.json()["tried"], answer.text
    assert answer.json()["num_tensors"] > 0
    assert answer.json()["num_sites"] >= 0
    return [warning for warning in answer.json()["warnings"] if NOTHING in warning]


@torch.no_grad()
def lora_with(base: Any, value_a: float | None, value_b: float, **config: Any) -> CheckpointFiles:
    """A LoRA with values of this size, of both signs; without one for A, as training begins."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(base, peft.LoraConfig(**{"r": 2, "target_modules": "all-linear", **config}))
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_A" in name and value_a is not None:
            parameter.copy_(value_a * torch.randn(parameter.shape, generator=generator).sign())
        elif "lora_B" in name:
            parameter.copy_(value_b * torch.randn(parameter.shape, generator=generator).sign())
    return save(model)


@pytest.fixture(scope="module", params=("llama", "gpt2", "t5"))
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Any]]:
    kind, root = request.param, tmp_path_factory.mktemp(request.param)
    save_tiny_base(kind, root / "base")
    codec = word_codec(is_encoder_decoder=kind in SEQ2SEQ)
    with ServedModel(root / "base", root / "store", codec=codec) as made:
        yield kind, made


def test_trained_adapters_of_every_sort_are_tried_in_silence(served: tuple[str, ServedModel]) -> None:
    kind, server = served
    for at, method in enumerate(METHODS[kind]):
        files, _ = make_checkpoint(method, kind, seed=at, base=lively_base(kind))
        assert told(upload(server.client, method.replace("_", "-"), files)) == [], method


def test_an_untrained_adapter_is_told_and_tried_once(served: tuple[str, ServedModel]) -> None:
    kind, server = served
    files = lora_with(lively_base(kind), None, 0.0)
    (warning,) = told(upload(server.client, "untrained", files))
    assert "check that the trained weights were saved" in warning
    again = upload(server.client, "untrained", files).json()
    assert (again["version"], again["tried"], again["warnings"]) == (1, False, [])
    dry = upload(server.client, "other", files, dry_run=1).json()
    assert (dry["dry_run"], dry["tried"]) == (True, False)
    answer = server.client.post("/generate?adapter=untrained", json={"inputs": "t09"})
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_values_that_overflow_are_refused_and_leave_nothing(kind: str, tmp_path: Path) -> None:
    save_tiny_base(kind, tmp_path / "base")
    blobs = tmp_path / "store" / "blobs" / "sha256"
    targets = {"llama": ["gate_proj", "up_proj", "down_proj"], "gpt2": "all-linear"}[kind]
    files = lora_with(lively_base(kind), 6e4, 6e4, lora_alpha=10**6, target_modules=targets)
    codec = word_codec(is_encoder_decoder=False)
    with ServedModel(tmp_path / "base", tmp_path / "store", codec=codec) as server:
        refused = upload(server.client, "overflowing", files)
        assert (refused.status_code, refused.json().get("code")) == (422, "adapter_invalid"), refused.text
        assert "no numbers (NaN or infinite)" in refused.json()["errors"][0]["reason"]
        assert server.client.get("/adapters/overflowing").status_code == 404
        assert not list(blobs.iterdir())
        good, _ = make_checkpoint("lora", kind, seed=50, base=lively_base(kind))
        assert told(upload(server.client, "overflowing", good)) == []
        assert upload(server.client, "overflowing", files).status_code == 422
        assert server.client.get("/adapters/overflowing").json()["version"] == 1
        assert len(list(blobs.iterdir())) == 1


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_a_half_precision_base_overflows_sooner(kind: str, tmp_path: Path) -> None:
    save_tiny_base(kind, tmp_path / "base")
    server = ServedModel(tmp_path / "base", tmp_path / "store", codec=word_codec(is_encoder_decoder=kind in SEQ2SEQ))
    server.settings = server.settings.model_copy(update={"dtype": "float16"})
    files = lora_with(lively_base(kind), 300.0, 300.0, lora_alpha=2)
    with server:
        refused = upload(server.client, "too-large", files)
        assert (refused.status_code, refused.json().get("code")) == (422, "adapter_invalid"), refused.text
        fine, _ = make_checkpoint("lora", kind, base=lively_base(kind))
        assert told(upload(server.client, "fine", fine)) == []


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_an_overflow_that_a_norm_swallows_is_told(kind: str, tmp_path: Path) -> None:
    save_tiny_base(kind, tmp_path / "base")
    codec = word_codec(is_encoder_decoder=kind in SEQ2SEQ)
    with ServedModel(tmp_path / "base", tmp_path / "store", codec=codec) as server:
        answer = upload(server.client, "loud", lora_with(lively_base(kind), 6e4, 6e4, lora_alpha=10**6))
        assert answer.status_code == 201, answer.text
        (warning,) = answer.json()["warnings"]
        assert warning.startswith("gives one and the same value everywhere")


def test_heads_and_bodies_of_an_encoder(tmp_path: Path) -> None:
    tiny_encoder("bert").save_pretrained(tmp_path / "base")
    word_codec(is_encoder_decoder=False)._tokenizer.save_pretrained(tmp_path / "base")  # type: ignore[attr-defined]
    targets = ["query", "value"]
    with ServedModel(tmp_path / "base", tmp_path / "store") as server:
        for task in ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"):
            num_labels = 2 if task == "QUESTION_ANS" else 3
            model = adapted(
                tiny_encoder("bert", task, num_labels=num_labels),
                peft.LoraConfig(task_type=task, target_modules=targets),
            )
            assert told(upload(server.client, task.lower(), save(model))) == [], task
            fresh = lora_with(
                tiny_encoder("bert", task, num_labels=num_labels), None, 0.0, task_type=task, target_modules=targets
            )
            (warning,) = told(upload(server.client, f"{task.lower()}-fresh", fresh))
            assert ("below its head" in warning) == (task != "FEATURE_EXTRACTION")
        virtual = peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3)
        assert told(upload(server.client, "soft", save(adapted(tiny_encoder("bert", "SEQ_CLS"), virtual)))) == []


def test_the_head_of_a_base_reads_its_adapters(tmp_path: Path) -> None:
    tiny_encoder("bert", "SEQ_CLS", num_labels=3).save_pretrained(tmp_path / "base")
    word_codec(is_encoder_decoder=False)._tokenizer.save_pretrained(tmp_path / "base")  # type: ignore[attr-defined]
    config = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query"])
    with ServedModel(tmp_path / "base", tmp_path / "store") as server:
        model = adapted(tiny_encoder("bert", "SEQ_CLS", num_labels=3), config)
        assert told(upload(server.client, "trained", save(model))) == []
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.zero_()
        assert told(upload(server.client, "head-only", save(model))) == []  # its head is not the base's


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5"])
def test_what_adapterhub_saved_is_tried_and_counted(family: str, tmp_path: Path) -> None:
    base_model(family).save_pretrained(tmp_path / "base")
    codec = word_codec(is_encoder_decoder=family in HUB_SEQ2SEQ)
    codec._tokenizer.save_pretrained(tmp_path / "base")  # type: ignore[attr-defined]
    with ServedModel(tmp_path / "base", tmp_path / "store", codec=codec) as server:
        for form in (*forms_of(family), *heads_of(family)):
            files = files_of(family, form)
            answer = upload(server.client, form.replace("_", "-"), files, weights_file=HUB_WEIGHTS_FILE)
            assert told(answer) == [], form
            content = answer.json()
            # what stands in front takes no site, and in that library no position
            assert content["num_sites"] > 0 or "prefix" in form or "prompt" in form, form
            stored = [files.weights, *([] if files.head_weights is None else [files.head_weights])]
            assert content["num_tensors"] == sum(len(load(each)) for each in stored), form
