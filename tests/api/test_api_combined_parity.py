"""Combinations over HTTP, on a real engine, in one mixed batch: the tokens are those of peft's own combination."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import peft
import pytest
import torch

from peft_serve.adapters.records import CONFIG_FILE, WEIGHTS_FILE
from tests.adapters.checkpoints import make_checkpoint
from tests.parity.bases import lively_base, save_tiny_base, words
from tests.parity.served import ServedModel

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # peft's own

PROMPT = [9, 30, 12, 41, 5, 17]
METHODS = {"one": ("lora", 1), "two": ("lora", 2), "soft": ("prompt_tuning", 3), "norms": ("ln_tuning", 4)}
EXPRESSIONS = ["one:0.7+two:0.3", "soft+one", "one+soft", "norms+two:-1.5", "one", "two:2", "base"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("combined")
    save_tiny_base("llama", root / "base")
    for name, (method, seed) in METHODS.items():
        files, _ = make_checkpoint(method, "llama", seed=seed)
        (root / "adapters" / name).mkdir(parents=True)
        (root / "adapters" / name / CONFIG_FILE).write_bytes(files.config)
        (root / "adapters" / name / WEIGHTS_FILE).write_bytes(files.weights)
    return root


def peft_of(expression: str, folder: Path) -> Any:
    """Every part on top of the one before: LoRAs by `add_weighted_adapter`, others merged, the prompt last."""
    model: Any = lively_base("llama")
    terms = [(term.partition(":")[0], float(term.partition(":")[2] or 1)) for term in expression.split("+")]
    if "norms" in dict(terms):
        model = peft.PeftModel.from_pretrained(model, folder / "norms").merge_and_unload()
    loras = [(name, weight) for name, weight in terms if METHODS.get(name, ("",))[0] == "lora"]
    if loras:
        model = peft.PeftModel.from_pretrained(model, folder / loras[0][0], adapter_name=loras[0][0])
        for name, _ in loras[1:]:
            model.load_adapter(folder / name, adapter_name=name)
        model.add_weighted_adapter(*map(list, zip(*loras, strict=True)), "all", combination_type="cat")
        model.set_adapter("all")
        model = model.merge_and_unload()
    if "soft" in dict(terms):
        model = peft.PeftModel.from_pretrained(model, folder / "soft")
    return model.eval()


@torch.no_grad()
def oracle_tokens(model: Any) -> list[int]:
    ids = torch.tensor([PROMPT])
    made = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=False, eos_token_id=1,
        pad_token_id=0,
    )[0].tolist()  # fmt: skip
    made = made[len(PROMPT) :]
    return made[: made.index(1) + 1] if 1 in made else made


def test_tokens_equal_pefts_combination_in_one_batch(folders: Path, tmp_path: Path) -> None:
    expected = {each: oracle_tokens(peft_of(each, folders / "adapters")) for each in EXPRESSIONS}
    assert len(set(map(tuple, expected.values()))) >= len(EXPRESSIONS) - 1, (
        "combinations must matter (the prompt's place does not)"
    )
    with ServedModel(folders / "base", tmp_path, adapters=[folders / "adapters"]) as served:
        body = {
            "inputs": [words(PROMPT)] * len(EXPRESSIONS),
            "adapter": EXPRESSIONS,
            "parameters": {"max_new_tokens": 10, "details": True},
        }
        for _ in range(2):
            answer = served.client.post("/generate", json=body)
            assert answer.status_code == 200, answer.text
            tokens = [[token["id"] for token in each["details"]["tokens"]] for each in answer.json()]
            assert dict(zip(EXPRESSIONS, tokens, strict=True)) == expected
        refused = served.client.post("/generate?adapter=soft:0.5", json={"inputs": words(PROMPT)})
        assert (refused.status_code, refused.json()["param"]) == (422, "adapter")
        assert "a soft prompt has no weight" in refused.json()["detail"]
        again: httpx.Response = served.client.post("/v1/completions", json={"prompt": "t09", "model": "soft:0.5"})
        assert (again.status_code, again.json()["error"]["param"]) == (400, "adapter")
