"""`peft-serve adapters verify` of adapters that generate nothing, or that bring tokens of their own."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
from click.testing import Result
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from typer.testing import CliRunner

from peft_serve.adapters.records import CONFIG_FILE, HUB_WEIGHTS_FILE, PROFILE_FILE, WEIGHTS_FILE
from peft_serve.verify.command import app
from peft_serve.verify.report import ReadComparison, verdict
from tests.adapters.checkpoints import make_checkpoint
from tests.model.tiny_encoders import TASKS, tiny_encoder
from tests.parity.bases import lively_base, save_tiny_base
from tests.parity.reading_oracle import adapted

WORDS = 90
PROMPTS = ("--prompt", "t09 t30 t12 t55", "--prompt", "t17 t08")
TARGETS = {"bert": ["query", "value"], "distilbert": ["q_lin", "v_lin"], "llama": ["q_proj", "v_proj"]}


def save_encoder(family: str, folder: Path) -> None:
    """A body alone, and a tokenizer of words with BERT's special tokens and token types."""
    tiny_encoder(family).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"t{i:02}": i for i in range(WORDS)}, unk_token="t02"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(
        single="t03:0 $A:0 t04:0",
        pair="t03:0 $A:0 t04:0 $B:1 t04:1",
        special_tokens=[("t03", 3), ("t04", 4)],
    )
    names = {"pad_token": "t00", "unk_token": "t02", "cls_token": "t03", "sep_token": "t04"}
    inputs = ["input_ids", "attention_mask", *(["token_type_ids"] if family == "bert" else [])]
    PreTrainedTokenizerFast(tokenizer_object=words, model_input_names=inputs, **names).save_pretrained(folder)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {family: tmp_path_factory.mktemp(family) for family in TARGETS}
    save_tiny_base("llama", folders["llama"])
    for family in ("bert", "distilbert"):
        save_encoder(family, folders[family])
    return folders


def train(base: Path, family: str, task: str, folder: Path, num_labels: int = 3, **more: Any) -> Any:
    """An adapter for the task, on the class of it."""
    labels = {} if task == "FEATURE_EXTRACTION" else {"num_labels": 2 if task == "QUESTION_ANS" else num_labels}
    model = TASKS[task].from_pretrained(base, **labels)
    config = peft.LoraConfig(**{"task_type": task, "r": 4, "target_modules": TARGETS[family], **more})
    made = adapted(model, config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made.save_pretrained(folder)
    return made


def verified(folder: Path, base: Path, *more: str) -> Result:
    asked = ["verify", str(folder), "--model", str(base), *(more or PROMPTS)]
    return CliRunner().invoke(app, asked, env={"COLUMNS": "200"})


@pytest.mark.parametrize(
    ("family", "task", "shapes"),
    [
        ("bert", "SEQ_CLS", ("1 x 3",)),
        ("bert", "TOKEN_CLS", ("6 x 3", "4 x 3")),
        ("bert", "QUESTION_ANS", ("x 2",)),
        ("bert", "FEATURE_EXTRACTION", ("1 x 32",)),
        ("distilbert", "SEQ_CLS", ("1 x 3",)),
        ("distilbert", "QUESTION_ANS", ("x 2",)),
        ("llama", "SEQ_CLS", ("1 x 3",)),
        ("llama", "TOKEN_CLS", ("4 x 3", "2 x 3")),
        ("llama", "FEATURE_EXTRACTION", ("1 x 32",)),
    ],
)
def test_what_is_read_equals_peft(
    bases: dict[str, Path], tmp_path: Path, family: str, task: str, shapes: tuple[str, ...]
) -> None:
    train(bases[family], family, task, tmp_path)
    context = ("--context", "t05 t06 t07 t40 t41") if task == "QUESTION_ANS" else ()
    result = verified(tmp_path, bases[family], *PROMPTS, *context)
    assert result.exit_code == 0, result.output
    assert "all 2 answers equal peft's, values within" in result.output
    for shape in shapes:
        assert f"{shape} values" in result.output


def test_a_soft_prompt_in_front_of_a_head(bases: dict[str, Path], tmp_path: Path) -> None:
    model = TASKS["SEQ_CLS"].from_pretrained(bases["bert"], num_labels=3)
    made = adapted(model, peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made.save_pretrained(tmp_path)
    result = verified(tmp_path, bases["bert"])
    assert result.exit_code == 0, result.output


def test_a_base_with_a_head_of_its_own(bases: dict[str, Path], tmp_path: Path) -> None:
    """The adapter's head has more labels than the base's; one without a head is read by the base's."""
    tiny_encoder("bert", "SEQ_CLS", num_labels=2).save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(bases["bert"]).save_pretrained(tmp_path / "base")
    model = TASKS["SEQ_CLS"].from_pretrained(tmp_path / "base")
    headless = adapted(model, peft.LoraConfig(r=4, target_modules=TARGETS["bert"]))
    headless.save_pretrained(tmp_path / "headless")
    train(tmp_path / "base", "bert", "SEQ_CLS", tmp_path / "headed", num_labels=2)
    for name in ("headless", "headed"):
        result = verified(tmp_path / name, tmp_path / "base")
        assert result.exit_code == 0, result.output
        assert result.output.count("yes") == 4, "equal to peft, and not what the base's own head says"


def test_a_template_goes_around_a_text_that_is_read_whole(bases: dict[str, Path], tmp_path: Path) -> None:
    for task, shape in (("SEQ_CLS", "1 x 3"), ("TOKEN_CLS", "4 x 3")):
        train(bases["bert"], "bert", task, tmp_path / task)
        profile = {"template": "t20 {text} t21", "examples": ["t09 t30"]}
        (tmp_path / task / PROFILE_FILE).write_text(json.dumps(profile))
        asked = ["verify", str(tmp_path / task), "--model", str(bases["bert"])]
        result = CliRunner().invoke(app, asked, env={"COLUMNS": "200"})
        assert result.exit_code == 0, result.output
        assert f"{shape} values" in result.output
        assert ("t20 t09 t30 t21" in result.output) == (task == "SEQ_CLS")


def test_tokens_of_its_own(tmp_path: Path) -> None:
    """The prompts hold words that only the adapter knows, one of which ends answers."""
    model = lively_base("llama")
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 1, 0
    model.save_pretrained(tmp_path / "base")
    words = Tokenizer(models.WordLevel({f"t{i:02}": i for i in range(60)}, unk_token="t02"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="t00", eos_token="t01", unk_token="t02")
    tokenizer.save_pretrained(tmp_path / "base")
    tokenizer.add_tokens(["<call>"])
    tokenizer.add_special_tokens({"eos_token": "<end>"})

    def change(config: Any) -> None:
        config.trainable_token_indices = {"embed_tokens": [60, 61]}

    _, trained = make_checkpoint("lora", "llama", base=lively_base("llama"), change=change)
    trained.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    prompts = [part for i in range(10, 22) for part in ("--prompt", f"t{i} <call> t12 <end>")]
    result = verified(tmp_path / "adapter", tmp_path / "base", *prompts)
    assert result.exit_code == 0, result.output
    assert "all 12 answers equal" in result.output
    assert any(f" {n} tokens" in result.output for n in range(1, 16)), "an answer is ended by a token of its own"


def test_another_class_than_its_task_says_is_told(bases: dict[str, Path], tmp_path: Path) -> None:
    """Trained below a head, saved without a task: peft would pass over the tensors and say so in a warning only."""
    train(bases["bert"], "bert", "FEATURE_EXTRACTION", tmp_path)
    weights = load_file(tmp_path / WEIGHTS_FILE)
    renamed = {key.replace("base_model.model.", "base_model.model.bert."): value for key, value in weights.items()}
    save_file(renamed, tmp_path / WEIGHTS_FILE)
    result = verified(tmp_path, bases["bert"])
    assert result.exit_code == 2
    assert "peft finds no place for the adapter's tensors in the BertModel" in result.output


def test_an_adapterhub_folder_says_what_it_takes(bases: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / CONFIG_FILE).write_text(json.dumps({"config": {}, "name": "a", "model_type": "bert"}))
    (tmp_path / HUB_WEIGHTS_FILE).write_bytes(b"")
    result = verified(tmp_path, bases["bert"])
    assert result.exit_code == 2
    assert "pip install adapters" in result.output
    (tmp_path / HUB_WEIGHTS_FILE).unlink()
    result = verified(tmp_path, bases["bert"])
    assert result.exit_code == 2
    assert WEIGHTS_FILE in result.output


def test_a_task_that_the_base_has_no_head_for(tmp_path: Path) -> None:
    """An encoder-decoder's hidden states are not served."""
    save_tiny_base("t5", tmp_path / "base")
    files, _ = make_checkpoint("lora", "t5", base=lively_base("t5"))
    (tmp_path / WEIGHTS_FILE).write_bytes(files.weights)
    config = {**json.loads(files.config), "task_type": "FEATURE_EXTRACTION"}
    (tmp_path / CONFIG_FILE).write_text(json.dumps(config))
    result = verified(tmp_path, tmp_path / "base")
    assert result.exit_code == 2
    assert "its task is FEATURE_EXTRACTION" in result.output


def test_what_the_server_refuses_is_named(bases: dict[str, Path], tmp_path: Path) -> None:
    train(bases["bert"], "bert", "SEQ_CLS", tmp_path)
    (tmp_path / PROFILE_FILE).write_text(json.dumps({"labels": ["one"]}))
    result = verified(tmp_path, bases["bert"])
    assert result.exit_code == 2
    assert "the server refuses the adapter: peft_serve.json: labels" in result.output


def test_readings_are_compared_by_shape_and_by_value() -> None:
    def compared(served: Any, base: Any = None) -> ReadComparison:
        return ReadComparison(text="a text", expected=((1.0, -20.0),), served=served, base=base)

    assert compared(((1.0, -20.0 + 1e-4),)).is_equal, "within rounding of the largest value"
    assert not compared(((1.01, -20.0),)).is_equal
    assert not compared(((1.0,),)).is_equal
    assert not compared(((1.0, -20.0), (1.0, -20.0))).is_equal
    assert compared(((1.0,),)).told == "1 x 2 values / 1 x 1 values"
    assert compared(((1.0, -20.0),)).moves is None
    assert compared(((1.0, -20.0),), base=((1.0, -20.0),)).moves is False
    assert compared(((1.0, -20.0),), base=((1.0, -20.0, 3.0),)).moves is None, "another head"
    is_equal, sentence = verdict([compared(((1.0, -20.0),)), compared(((1.0, 20.0),))])
    assert (is_equal, sentence) == (False, "1 of 2 answers differ from peft's")
    is_equal, sentence = verdict([compared(((1.0, -20.0),), base=((1.0, -20.0),))])
    assert is_equal
    assert "changes nothing" in sentence
    assert "changes nothing" not in verdict([compared(((1.0, -20.0),))])[1]
