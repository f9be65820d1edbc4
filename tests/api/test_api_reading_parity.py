"""Heads and embeddings over HTTP, on a real engine over a tiny BERT: the numbers are peft's and transformers'."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from peft_serve.adapters.records import CONFIG_FILE, PROFILE_FILE, WEIGHTS_FILE
from tests.parity.served import ServedModel

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # peft's own

TEXTS = ("Where is my order ?", "Anna lives in New York and my parcel came on Monday .", "who")
HEADS: dict[str, tuple[str, str, int]] = {
    "seq": ("BertForSequenceClassification", "SEQ_CLS", 3),
    "more": ("BertForSequenceClassification", "SEQ_CLS", 5),
    "tokens": ("BertForTokenClassification", "TOKEN_CLS", 4),
    "spans": ("BertForQuestionAnswering", "QUESTION_ANS", 2),
    "plain": ("BertModel", "FEATURE_EXTRACTION", 2),
}


def make_oracle(name: str, base: Path, seed: int) -> Any:
    """A LoRA with a trained head, as peft runs it."""
    class_name, task, num_labels = HEADS[name]
    config = transformers.BertConfig.from_pretrained(base, num_labels=num_labels)
    torch.manual_seed(seed)
    model = getattr(transformers, class_name)(config)
    model.base_model.load_state_dict(
        transformers.BertModel.from_pretrained(base).state_dict(), strict=name in ("seq", "more", "plain")
    )
    tuned = peft.get_peft_model(model, peft.LoraConfig(task_type=task, target_modules=["query", "value"], r=4))
    with torch.no_grad():
        for parameter_name, parameter in tuned.named_parameters():
            if "lora_B" in parameter_name or "modules_to_save" in parameter_name:
                parameter.normal_(std=0.5)
    return tuned.eval()


@pytest.fixture(scope="module")
def oracles(pair_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    root = tmp_path_factory.mktemp("bert")
    config = transformers.BertConfig(
        vocab_size=len(pair_tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=64,
        initializer_range=0.5,
    )
    torch.manual_seed(0)
    transformers.BertModel(config).save_pretrained(root / "base")
    pair_tokenizer.save_pretrained(root / "base")
    made = {name: make_oracle(name, root / "base", seed) for seed, name in enumerate(HEADS)}
    for name, oracle in made.items():
        oracle.save_pretrained(root / "adapters" / name)
    return root, made


@pytest.fixture(scope="module")
def server(oracles: tuple[Path, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedModel]:
    root, _ = oracles
    with ServedModel(root / "base", tmp_path_factory.mktemp("store"), adapters=[root / "adapters"]) as made:
        yield made


@torch.no_grad()
def run(model: Any, tokenizer: Any, *texts: str) -> Any:
    return model(**tokenizer(*texts, return_tensors="pt"))


def scores(answer: list[dict[str, Any]]) -> list[float]:
    return [each["score"] for each in sorted(answer, key=lambda each: each["label"])]


def close(expected: torch.Tensor) -> Any:
    return pytest.approx(expected.tolist(), rel=1e-4, abs=1e-5)


def test_every_head_in_one_batch(server: ServedModel, oracles: Any, pair_tokenizer: Any) -> None:
    _, made = oracles
    names = ["seq", "more", "tokens"] * len(TEXTS)
    inputs = [text for text in TEXTS for _ in range(3)]
    body = {"inputs": inputs, "adapter": names, "parameters": {"ignore_labels": []}}
    answer = server.client.post("/classify", json=body)
    assert answer.status_code == 200, answer.text
    for text, name, got in zip(inputs, names, answer.json(), strict=True):
        shares = run(made[name], pair_tokenizer, text).logits[0].softmax(-1)
        if name == "tokens":
            assert [each["score"] for each in got] == close(shares.max(-1).values[1:-1])
            assert [each["entity"] for each in got] == [f"LABEL_{i}" for i in shares.argmax(-1)[1:-1]]
        else:
            assert scores(got) == close(shares)
    pair = server.client.post("/classify?adapter=seq", json={"inputs": {"text": TEXTS[0], "text_pair": TEXTS[1]}})
    assert scores(pair.json()[0]) == close(run(made["seq"], pair_tokenizer, TEXTS[0], TEXTS[1]).logits[0].softmax(-1))


def test_answers_are_in_the_context(server: ServedModel, oracles: Any, pair_tokenizer: Any) -> None:
    _, made = oracles
    question = {"question": TEXTS[2], "context": TEXTS[1]}
    body = {"inputs": question, "parameters": {"top_k": 1, "max_answer_len": 1, "align_to_words": False}}
    (got,) = server.client.post("/classify?adapter=spans", json=body).json()
    out = run(made["spans"], pair_tokenizer, TEXTS[2], TEXTS[1])
    ids = pair_tokenizer(TEXTS[2], TEXTS[1], return_offsets_mapping=True)
    context = [i for i, of in enumerate(ids.sequence_ids(0)) if of == 1]
    allowed = torch.tensor([0, *context])
    product = out.start_logits[0, allowed].softmax(-1) * out.end_logits[0, allowed].softmax(-1)
    best = int(product[1:].argmax())
    assert got["score"] == pytest.approx(float(product[1:][best]), rel=1e-4)
    start, end = ids["offset_mapping"][context[best]]
    assert (got["start"], got["end"], got["answer"]) == (start, end, TEXTS[1][start:end])


def test_embeddings_are_the_hidden_states(server: ServedModel, oracles: Any, pair_tokenizer: Any) -> None:
    root, made = oracles
    base = transformers.BertModel.from_pretrained(root / "base").eval()
    for name, model in (("plain", made["plain"]), ("base", base)):
        for pooling, pooled in (("mean", lambda h: h.mean(0)), ("first", lambda h: h[0]), ("last", lambda h: h[-1])):
            got = server.client.post(f"/embed?adapter={name}", json={"inputs": list(TEXTS), "pooling": pooling}).json()
            for text, vector in zip(TEXTS, got, strict=True):
                assert vector == close(pooled(run(model, pair_tokenizer, text).last_hidden_state[0]))
    openai = server.client.post("/v1/embeddings", json={"input": TEXTS[0], "model": "plain"}).json()
    assert openai["data"][0]["embedding"] == close(
        run(made["plain"], pair_tokenizer, TEXTS[0]).last_hidden_state[0].mean(0)
    )


def test_an_ensemble_and_a_combination(server: ServedModel, oracles: Any, pair_tokenizer: Any) -> None:
    _, made = oracles
    body = {"inputs": TEXTS[0], "ensemble": ["seq", "seq+plain"], "parameters": {"details": True}}
    told = server.client.post("/classify", json=body).json()
    first, second = (scores(member["answer"]) for member in told["members"])
    assert scores(told["answer"]) == pytest.approx([(a + b) / 2 for a, b in zip(first, second, strict=True)])
    assert first == close(run(made["seq"], pair_tokenizer, TEXTS[0]).logits[0].softmax(-1))
    assert first != pytest.approx(second, rel=1e-3), "the second member is a combination"
    differ = server.client.post("/classify", json={"inputs": TEXTS[0], "ensemble": ["seq", "more"]})
    assert (differ.status_code, "different labels" in differ.json()["detail"]) == (422, True)


def test_labels_are_checked_at_upload_and_used(server: ServedModel, oracles: Any) -> None:
    root, _ = oracles
    files = {
        path.name: path.read_bytes()
        for path in (root / "adapters" / "seq").iterdir()
        if path.name in (CONFIG_FILE, WEIGHTS_FILE)
    }

    def upload(labels: list[str]) -> Any:
        profile = json.dumps({"labels": labels}).encode()
        parts = {name: (name, content) for name, content in (files | {PROFILE_FILE: profile}).items()}
        return server.client.put("/adapters/named", files=parts)

    wrong = upload(["sad", "glad"])
    assert (wrong.status_code, wrong.json()["code"]) == (422, "adapter_invalid")
    assert wrong.json()["errors"][0]["path"] == "peft_serve.json: labels"
    assert "has 2 names; the task head has 3 outputs" in wrong.json()["errors"][0]["reason"]
    assert upload(["sad", "glad", "mad"]).status_code == 201
    named = server.client.post("/classify?adapter=named", json={"inputs": TEXTS[0]}).json()[0]
    plain = server.client.post("/classify?adapter=seq", json={"inputs": TEXTS[0]}).json()[0]
    assert [each["score"] for each in named] == [each["score"] for each in plain]
    order = {"LABEL_0": "sad", "LABEL_1": "glad", "LABEL_2": "mad"}
    assert [each["label"] for each in named] == [order[each["label"]] for each in plain]
    card = server.client.get("/v1/models/named").json()
    assert (card["labels"], card["head"]) == (["sad", "glad", "mad"], {"task": "SEQ_CLS", "num_labels": 3})
