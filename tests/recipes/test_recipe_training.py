"""The recipes run: a few steps of each on invented rows, and scores that are what they claim."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pretrain_base
import pytest
import torch
import train_adapter
from answering import AnswerModel, equal_length_batches, load_adapted, load_base, predict
from base_text import FIRST_SENTINEL_ID
from tasks import TASKS, Row, Wording
from transformers import AutoTokenizer

# PEFT asks transformers for a property that transformers is about to rename.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

ROOT = Path(__file__).resolve().parents[2]
LLAMA = ROOT / "server" / "peft_serve" / "demo" / "demo-llama"
T5 = ROOT / "server" / "peft_serve" / "demo" / "demo-t5"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Invented messages with spam and ham, and what a base is pre-trained on."""
    folder = tmp_path_factory.mktemp("data")
    rng = random.Random(0)
    words = ["win", "free", "prize", "boat", "lunch", "home", "late", "bus", "dinner", "call"]

    def write(name: str, records: list[dict[str, str]]) -> None:
        (folder / name).write_text("".join(json.dumps(it) + "\n" for it in records), encoding="utf-8")

    def text(words_: list[str]) -> str:
        return " ".join(rng.choices(words_, k=6))

    splits = ["train"] * 12 + ["validation"] * 4 + ["test"] * 4
    spam = [{"split": s, "text": text(words[:4]), "label": "spam"} for s in splits]
    ham = [{"split": s, "text": text(words[4:]), "label": "ham"} for s in splits]
    write("sms_spam.jsonl", [*spam, *ham])
    write("goemotions.jsonl", [{"split": "train", "text": text(words), "label": "joy"} for _ in range(40)])
    clinc = {"split": "train", "label": "book boat", "domain": "travel"}
    write("clinc150.jsonl", [{**clinc, "text": text(words)} for _ in range(40)])
    for name in ("books", "tweets", "wiki"):
        (folder / f"{name}.txt").write_text("".join(text(words) + "\n" for _ in range(400)), encoding="utf-8")
    return folder


@pytest.mark.parametrize(("base", "method"), [(LLAMA, "lora"), (LLAMA, "ia3"), (LLAMA, "prompt"), (T5, "lora")])
def test_an_adapter_is_fitted_saved_and_scored(
    base: Path, method: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "mine"
    options = f"train_adapter.py sms-spam --method {method} --base {base} --data {data} --out {out} --epochs 1"
    monkeypatch.setattr(
        "sys.argv", [*options.split(), "--batch-rows", "8", "--validations", "2", "--num-averaged", "2"]
    )
    train_adapter.main()
    record = json.loads((tmp_path / "mine.result.json").read_text(encoding="utf-8"))
    assert record["base"] == f"peft-serve/{base.name}"
    assert record["fit"]["steps"] == 3
    assert record["test"]["rows"] == 8
    assert str(tmp_path) not in json.dumps(record), "a result names no path of the machine"
    assert {it.name for it in out.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "peft_serve.json",
    }
    load_adapted(str(base), out)


@pytest.mark.parametrize("base", [LLAMA, T5], ids=["llama", "t5"])
@torch.no_grad()
def test_a_score_is_the_sum_over_all_tokens_of_the_choice(base: Path) -> None:
    model, tokenizer = load_base(str(base))
    wording = Wording(template="Text : {text} Emotion :", choices={"a": "joy", "b": "great annoyance", "c": "no"})
    asked = AnswerModel.of(model.eval(), tokenizer, wording)
    prompt = asked.prompt_ids("the bus is late again")
    expected = [naive_score(model, prompt, choice) for choice in asked.choices]
    assert asked.scores([prompt, prompt])[1].tolist() == pytest.approx(expected, abs=1e-3)


def naive_score(model: Any, prompt: list[int], choice: list[int]) -> float:
    """Token by token, one sequence, no cache."""
    if model.config.is_encoder_decoder:
        decoded = torch.tensor([[model.config.decoder_start_token_id, *choice[:-1]]])
        logits = model(input_ids=torch.tensor([prompt]), decoder_input_ids=decoded).logits[0]
    else:
        logits = model(input_ids=torch.tensor([[*prompt, *choice]])).logits[0, len(prompt) - 1 : -1]
    logps = logits.log_softmax(-1)
    return sum(float(logps[i, token]) for i, token in enumerate(choice))


@torch.no_grad()
def test_with_many_choices_the_best_is_still_the_true_best() -> None:
    model, tokenizer = load_base(str(LLAMA))
    asked = AnswerModel.of(model.eval(), tokenizer, TASKS["banking77"].wordings["plain"])
    prompt = asked.prompt_ids("my card is gone")
    longest = max(map(len, asked.choices))
    rows = [[*prompt, *choice, *[0] * (longest - len(choice))] for choice in asked.choices]
    logps = model(input_ids=torch.tensor(rows)).logits[:, len(prompt) - 1 : -1].log_softmax(-1)
    expected = [sum(float(logps[i, j, t]) for j, t in enumerate(choice)) for i, choice in enumerate(asked.choices)]
    assert int(asked.scores([prompt])[0].argmax()) == int(np.argmax(expected))


def test_long_texts_are_cut_by_tokens_for_training_only() -> None:
    tokenizer = AutoTokenizer.from_pretrained(str(LLAMA))
    asked = AnswerModel.of(load_base(str(LLAMA))[0], tokenizer, TASKS["sms-spam"].wordings["plain"])
    text = "bus " * 300
    whole, cut = asked.prompt_ids(text), asked.prompt_ids(text, 100)
    around = len(asked.prompt_ids("")) + 1
    assert len(cut) <= 100 + around < len(whole)
    assert cut[-3:] == whole[-3:], "the words after the text stay"


def test_batches_hold_rows_of_one_length_and_every_row_once() -> None:
    prompts = [[0] * (i % 5 + 1) for i in range(57)]
    batches = list(equal_length_batches(prompts, 4))
    assert sorted(i for batch in batches for i in batch) == list(range(57))
    assert all(len(batch) <= 4 and len({len(prompts[i]) for i in batch}) == 1 for batch in batches)


def test_predictions_come_in_the_order_of_the_rows() -> None:
    model, tokenizer = load_base(str(LLAMA))
    asked = AnswerModel.of(model, tokenizer, TASKS["sms-spam"].wordings["plain"])
    rows = [Row(split="test", text="bus " * (i % 4 + 1), label="ham") for i in range(9)]
    answers, _ = predict(asked, rows)
    assert answers == [predict(asked, [row])[0][0] for row in rows]


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_a_base_is_made_from_nothing_but_text(
    kind: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretrain_base, "BATCH_TOKENS", 256)
    out = tmp_path / "base"
    small = "--steps 3 --vocabulary 300 --width 64"
    pretrain_base.main(f"--kind {kind} --text {data} --data {data} --out {out} {small}".split())
    model, tokenizer = load_base(str(out))
    ids = tokenizer("free boat")["input_ids"]
    assert (ids[0] == 3) if kind == "llama" else (ids[-1] == 1)
    assert model.config.vocab_size == len(tokenizer)


def test_span_corruption_loses_no_token() -> None:
    tokens = list(range(100, 200))
    source, target = pretrain_base.corrupted(tokens, np.random.default_rng(1))
    assert sorted(t for t in source + target if t >= 100) == tokens
    sentinels = [t for t in source if FIRST_SENTINEL_ID <= t < FIRST_SENTINEL_ID + 16]
    assert sentinels == [t for t in target if FIRST_SENTINEL_ID <= t < FIRST_SENTINEL_ID + 16]
    assert sentinels == list(range(FIRST_SENTINEL_ID, FIRST_SENTINEL_ID + len(sentinels)))


def test_the_rate_warms_up_stays_and_falls() -> None:
    rates = [pretrain_base.schedule(step, 1000) for step in range(1000)]
    assert rates[0] < 0.05
    assert rates[100] == rates[299] == 1.0
    assert rates[-1] == pytest.approx(0.05, abs=0.01)
