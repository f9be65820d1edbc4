"""What is shipped is whole: bases load, adapters load in PEFT, answer in their labels, and are small."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from answering import AnswerModel, load_base
from cards import END, START, TRIES
from peft import PeftConfig, PeftModel
from safetensors import safe_open
from tasks import RECIPES, TASKS, Recipe

from peft_serve.adapters.profile import parse_profile

# PEFT asks transformers for a property that transformers is about to rename.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

ROOT = Path(__file__).resolve().parents[2]
BASES = ROOT / "server" / "peft_serve" / "demo"
ADAPTERS = ROOT / "adapters"
SHIPPED = sorted(RECIPES)
ids = ["/".join(key) for key in SHIPPED]
METHODS = {"lora": "LORA", "ia3": "IA3", "prompt": "PROMPT_TUNING"}


@pytest.fixture(scope="module", params=["demo-llama", "demo-t5"])
def base(request: pytest.FixtureRequest) -> tuple[str, Any, Any]:
    torch.set_num_threads(1)
    return request.param, *load_base(str(BASES / request.param))


def folder(key: tuple[str, str]) -> Path:
    return ADAPTERS / key[0] / key[1]


def bytes_under(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def test_no_folder_is_without_a_recipe_and_no_recipe_without_a_folder() -> None:
    found = {(base.name, it.name) for base in ADAPTERS.glob("demo-*") for it in base.iterdir() if it.is_dir()}
    assert found == set(RECIPES)


def test_adapters_is_no_python_package() -> None:
    assert not (ADAPTERS / "__init__.py").exists(), "it would hide AdapterHub's `adapters`"


def test_the_llama_demo_is_below_20_megabytes() -> None:
    assert bytes_under(BASES / "demo-llama") + bytes_under(ADAPTERS / "demo-llama") < 20_000_000


@pytest.mark.parametrize("key", SHIPPED, ids=ids)
def test_a_checkpoint_has_its_four_files_and_names_the_public_base(key: tuple[str, str]) -> None:
    names = {it.name for it in folder(key).iterdir()}
    assert names == {"README.md", "adapter_config.json", "adapter_model.safetensors", "peft_serve.json"}
    config = PeftConfig.from_pretrained(str(folder(key)))
    assert config.base_model_name_or_path == f"peft-serve/{key[0]}"
    assert config.peft_type.value == METHODS[RECIPES[key].method]


@pytest.mark.parametrize("key", SHIPPED, ids=ids)
def test_the_serve_file_says_what_the_recipe_says(key: tuple[str, str]) -> None:
    content = (folder(key) / "peft_serve.json").read_bytes()
    served = json.loads(content)
    wording = TASKS[RECIPES[key].task].wordings[RECIPES[key].wording]
    assert set(served) == {"template", "choices", "parameters", "labels"}
    assert served["template"] == wording.template
    assert served["choices"] == wording.choices
    assert served["labels"] == list(wording.choices)
    assert set(served["parameters"]) == {"max_new_tokens"}
    assert parse_profile(content).labels == tuple(wording.choices), "the server reads it without a complaint"


@pytest.mark.parametrize("key", SHIPPED, ids=ids)
def test_lora_is_shipped_in_bf16(key: tuple[str, str]) -> None:
    with safe_open(folder(key) / "adapter_model.safetensors", framework="pt") as file:
        types = {file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118  # safe_open is no mapping
    assert types == {torch.bfloat16 if RECIPES[key].method == "lora" else torch.float32}


@pytest.mark.parametrize("key", SHIPPED, ids=ids)
def test_a_card_has_figures_and_says_how_it_compares(key: tuple[str, str]) -> None:
    card = (folder(key) / "README.md").read_text(encoding="utf-8")
    block = card.partition(START)[2].partition(END)[0]
    assert "held-out rows" in block
    assert "TF-IDF" in block
    assert "Limits" in card
    assert "licence" in card


def test_adapters_answer_invented_texts_as_they_should(base: tuple[str, Any, Any]) -> None:
    """The texts each card shows get the answers a reader expects."""
    name, model, tokenizer = base
    expected = {
        "twitter-complaints": ["complaint", "no complaint"],
        "twitter-complaints-ia3": ["complaint", "no complaint"],
        "sms-spam": ["spam", "ham"],
        "trec": ["person", "number"],
    }
    for key in (key for key in SHIPPED if key[0] == name):
        adapted = PeftModel.from_pretrained(copy.deepcopy(model), str(folder(key)))
        answers = answers_of(adapted.eval(), tokenizer, RECIPES[key])
        assert set(answers) <= set(TASKS[RECIPES[key].task].labels)
        if key[1] in expected:
            assert answers == expected[key[1]]


@torch.no_grad()
def answers_of(model: Any, tokenizer: Any, recipe: Recipe) -> list[str]:
    asked = AnswerModel.of(model, tokenizer, TASKS[recipe.task].wordings[recipe.wording])
    scores = [asked.scores([asked.prompt_ids(text)])[0] for text in TRIES[recipe.task]]
    return [asked.labels[int(row.argmax())] for row in scores]


def test_the_scored_prompt_is_the_servers(base: tuple[str, Any, Any]) -> None:
    """The whole prompt as one string gives the tokens of its pieces, special tokens around them."""
    _, _, tokenizer = base

    def bare(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    text = "@acme it's 3 hours late... again!"
    assert bare(f"Tweet text : {text} Label :") == bare("Tweet text :") + bare(text) + bare("Label :")
