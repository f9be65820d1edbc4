"""Task heads and embeddings under adapters of every method, alone and in one mixed batch: what peft gives.

The checkpoints come from peft, on the class of each task. They are served from the bare body, from a model with a
head of its own, and from a causal language model, whose paths all differ.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import transformers
from transformers import PreTrainedModel

from peft_serve.adapters.primitives import Adapter
from peft_serve.adapters.records import HeadFacts
from peft_serve.core import BASE, AdapterId, Reading
from peft_serve.errors import AdapterInvalid, InvalidParameter
from peft_serve.model.base import ResidentBase
from tests.model.reading_driver import ReadingDriver, Wish, random_prompt
from tests.model.tiny_encoders import HIDDEN, VOCAB, enlivened, tiny_encoder
from tests.parity.reading_oracle import READING_OF, adapted, compiled, files_of, own_logits, own_states

ATTENTION = {
    "bert": ["query", "value"],
    "roberta": ["query", "value"],
    "electra": ["query", "value"],
    "distilbert": ["q_lin", "v_lin"],
    "deberta-v2": ["query_proj", "key_proj", "value_proj"],
    "deberta-v2-conv": ["query_proj", "pos_key_proj", "pos_query_proj"],
}
NORM = {"distilbert": "output_layer_norm"}
FEED_FORWARD = {"distilbert": "lin2"}
TASKS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")


def lora(family: str, **more: Any) -> peft.PeftConfig:
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ATTENTION[family], **more})


def _everywhere(family: str, task: str) -> dict[str, Any]:
    """Every linear layer and every bias; where peft would stand on the head it also saves, the body's layers."""
    bias = "none" if family == "deberta-v2-conv" else "all"  # its convolution has one, and is no site
    if task == "SEQ_CLS" and family not in ("distilbert", "deberta-v2", "deberta-v2-conv"):
        return {"target_modules": "all-linear", "bias": bias}
    dense = ["lin1", "lin2", "out_lin"] if family == "distilbert" else ["output.dense", "intermediate.dense"]
    return {"target_modules": [*ATTENTION[family], *dense], "bias": bias}


def methods_for(family: str, task: str) -> dict[str, peft.PeftConfig]:
    """Every method that peft can train here."""
    down = FEED_FORWARD.get(family, "output.dense")
    made = {
        "lora": lora(family),
        "lora_all": lora(family, **_everywhere(family, task)),
        "lora_embedding": lora(family, target_modules=["word_embeddings", ATTENTION[family][0]]),
        "dora": lora(family, use_dora=True, r=2),
        "ia3": peft.IA3Config(target_modules=[ATTENTION[family][0], down], feedforward_modules=[down]),
        "ln_tuning": peft.LNTuningConfig(target_modules=[NORM.get(family, "LayerNorm")]),
    }
    if family != "electra":  # whose embeddings are narrower than its states here: peft's soft prompts do not fit
        virtual = {"num_virtual_tokens": 3, "token_dim": HIDDEN, "num_attention_heads": 4, "num_layers": 2}
        made["prompt_tuning"] = peft.PromptTuningConfig(**virtual)
        made["p_tuning"] = peft.PromptEncoderConfig(**(virtual | {"num_virtual_tokens": 5}), encoder_hidden_size=16)
    if family in ("bert", "roberta", "electra"):  # of the others peft says that they take no keys and values
        made["prefix_tuning"] = peft.PrefixTuningConfig(num_virtual_tokens=4)
    for config in made.values():
        config.task_type = task
        if family.startswith("deberta") and task == "SEQ_CLS":
            config.modules_to_save = ["pooler"]  # random in a new classifier, and peft does not save it by itself
    return made


class Batch:
    """Adapters on one base with their prompts, and what peft reads with each of them."""

    def __init__(self, base: ResidentBase, seed: int = 0) -> None:
        self.base = base
        self.adapters: dict[AdapterId, Adapter] = {}
        self.names: list[str] = []
        self.wishes: list[Wish] = []
        self.expected: list[torch.Tensor] = []
        self._random = random.Random(seed)

    def add(self, name: str, model: Any, task: str, *, segments: bool = False) -> None:
        """A checkpoint of this model, asked three times."""
        adapter, summary = compiled(files_of(model), self.base)
        self.adapters[adapter.id] = adapter
        assert summary.head is not None, name
        assert summary.head.task == task, name
        self.ask(name, model, READING_OF[task], adapter.id, segments=segments)

    def ask(
        self, name: str, model: Any, reading: Reading, adapter: AdapterId = BASE, *, segments: bool = False
    ) -> None:
        for _ in range(3):
            prompt = random_prompt(self._random, VOCAB)
            types = tuple(int(i > len(prompt) // 2) for i in range(len(prompt))) if segments else ()
            self.names.append(name)
            self.wishes.append(Wish(reading, prompt, adapter=adapter, segments=types))
            self.expected.append(own_logits(model, prompt, types))

    def check(self, **settings: int) -> None:
        """All at once, and each by itself."""
        driver = ReadingDriver(self.base, self.adapters, **settings)
        together = driver.read(self.wishes)
        for i, (name, own) in enumerate(zip(self.names, self.expected, strict=True)):
            for rows in (together[i], driver.read([self.wishes[i]])[0]):
                assert not isinstance(rows, Exception), (name, rows)
                torch.testing.assert_close(
                    torch.tensor(rows), own, rtol=1e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}"
                )


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("family", ATTENTION)
def test_heads_of_adapters_on_a_bare_encoder(family: str, task: str) -> None:
    batch = Batch(ResidentBase(tiny_encoder(family), name=family))
    for at, (name, config) in enumerate(methods_for(family, task).items()):
        num_labels = 2 if task == "QUESTION_ANS" else 2 + at % 4
        model = adapted(tiny_encoder(family, task, num_labels=num_labels), config, seed=at)
        batch.add(
            name, model, task, segments=family == "bert" and name == "lora" and task != "QUESTION_ANS"
        )  # peft drops them there
    batch.check()


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("family", ATTENTION)
def test_a_base_with_its_own_head_beside_adapters_with_theirs(family: str, task: str) -> None:
    own = tiny_encoder(family, task, num_labels=2)
    base = ResidentBase(tiny_encoder(family, task, num_labels=2), name=family)
    batch = Batch(base)
    batch.ask("base", own, READING_OF[task])
    for at, (name, config) in enumerate(methods_for(family, task).items()):
        num_labels = 2 if task == "QUESTION_ANS" else 2 + at % 3
        batch.add(name, adapted(tiny_encoder(family, task, num_labels=num_labels), config, seed=at), task)
    batch.check(max_step_tokens=40)
    assert base.labels == ("LABEL_0", "LABEL_1")


def test_tasks_share_a_step() -> None:
    batch = Batch(ResidentBase(tiny_encoder("bert"), name="bert"))
    for at, task in enumerate(TASKS * 2):
        config = lora("bert", task_type=task, r=2 + at)
        batch.add(f"{task}-{at}", adapted(tiny_encoder("bert", task), config, seed=at), task)
    driver = ReadingDriver(batch.base, batch.adapters, max_step_tokens=1000)
    for rows, own in zip(driver.read(batch.wishes), batch.expected, strict=True):
        torch.testing.assert_close(torch.tensor(rows), own, rtol=1e-4, atol=2e-5)
    assert len(driver.num_rows_by_step) == 1


def test_an_adapter_without_a_head_uses_the_bases_and_may_act_on_it() -> None:
    """peft lets LoRA stand on the classifier itself, without a task type."""
    base = ResidentBase(tiny_encoder("roberta", "SEQ_CLS", num_labels=3), name="roberta")
    batch = Batch(base)
    for at, targets in enumerate((["query"], ["query", "classifier.dense", "classifier.out_proj"])):
        model = adapted(tiny_encoder("roberta", "SEQ_CLS", num_labels=3), lora("roberta", target_modules=targets), at)
        adapter, summary = compiled(files_of(model), base)
        assert summary.head is None
        batch.adapters[adapter.id] = adapter
        batch.ask(f"lora-{at}", model, Reading.SEQUENCE, adapter.id)
    batch.check()


def test_a_saved_head_without_a_task_type_is_read_as_the_class_it_was_trained_on() -> None:
    base = ResidentBase(tiny_encoder("distilbert"), name="distilbert")
    config = lora("distilbert", modules_to_save=["pre_classifier", "classifier"])
    batch = Batch(base)
    batch.add("lora", adapted(tiny_encoder("distilbert", "SEQ_CLS", num_labels=4), config), "SEQ_CLS")
    batch.check()


# ---- decoders


def _causal(kind: str, wrap: Callable[..., Any], num_labels: int = 2) -> PreTrainedModel:
    sizes = {"vocab_size": VOCAB, "hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 4}
    if kind == "gpt2":
        config: Any = transformers.GPT2Config(**sizes, n_positions=128, pad_token_id=0)
    else:
        config = transformers.LlamaConfig(
            **sizes, intermediate_size=48, num_key_value_heads=2, max_position_embeddings=128, pad_token_id=0
        )
    config.num_labels = num_labels
    return enlivened(wrap.from_config(config, attn_implementation="eager"))  # type: ignore[attr-defined]


AUTO = {
    "SEQ_CLS": transformers.AutoModelForSequenceClassification,
    "TOKEN_CLS": transformers.AutoModelForTokenClassification,
    "QUESTION_ANS": transformers.AutoModelForQuestionAnswering,
}
DECODER_TARGETS = {"llama": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "c_fc"]}


def decoder_methods(kind: str, task: str) -> dict[str, peft.PeftConfig]:
    made = {
        "lora": peft.LoraConfig(r=4, target_modules=DECODER_TARGETS[kind], bias="all"),
        "ia3": peft.IA3Config(target_modules=DECODER_TARGETS[kind], feedforward_modules=DECODER_TARGETS[kind][-1:]),
        "prompt_tuning": peft.PromptTuningConfig(num_virtual_tokens=3),
        "prefix_tuning": peft.PrefixTuningConfig(num_virtual_tokens=4),
    }
    for config in made.values():
        config.task_type = task
    return made


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("max_step_tokens", [7, 300], ids=["in chunks", "whole"])
def test_heads_of_adapters_on_a_language_model(kind: str, task: str, max_step_tokens: int) -> None:
    batch = Batch(ResidentBase(_causal(kind, transformers.AutoModelForCausalLM), name=kind))
    for at, (name, config) in enumerate(decoder_methods(kind, task).items()):
        num_labels = 2 if task == "QUESTION_ANS" else 2 + at
        batch.add(name, adapted(_causal(kind, AUTO[task], num_labels), config, seed=at), task)
    batch.check(max_step_tokens=max_step_tokens)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_classifying_decoder_serves_its_own_head_and_adapters(kind: str) -> None:
    wrap = transformers.AutoModelForSequenceClassification
    own = _causal(kind, wrap, 3)
    base = ResidentBase(_causal(kind, wrap, 3), name=kind)
    assert not base.shape.generates
    assert not base.shape.is_encoder
    batch = Batch(base)
    batch.ask("base", own, Reading.SEQUENCE)
    batch.add("lora", adapted(_causal(kind, wrap, 5), decoder_methods(kind, "SEQ_CLS")["lora"]), "SEQ_CLS")
    batch.check(max_step_tokens=9)


@pytest.mark.parametrize("max_step_tokens", [2, 300], ids=["in chunks", "whole"])
def test_a_decoders_sequence_is_read_where_the_library_reads_it(max_step_tokens: int) -> None:
    """At the last token that is not padding, wherever that is."""
    wrap = transformers.AutoModelForSequenceClassification
    own, base = _causal("llama", wrap, 3), ResidentBase(_causal("llama", wrap, 3), name="llama")
    prompts = ((7, 8, 9, 0, 0, 0), (7, 0, 9), (0, 0, 0))
    driver = ReadingDriver(base, max_step_tokens=max_step_tokens)
    given = driver.read([Wish(Reading.SEQUENCE, prompt) for prompt in prompts])
    for rows, prompt in zip(given, prompts, strict=True):
        torch.testing.assert_close(torch.tensor(rows), own_logits(own, prompt), rtol=1e-4, atol=1e-5)


# ---- embeddings


@pytest.mark.parametrize("kind", ["bert", "roberta", "llama"])
def test_embeddings_of_adapters_are_the_states_that_peft_gives(kind: str) -> None:
    def bare() -> PreTrainedModel:
        return _causal(kind, transformers.AutoModel) if kind == "llama" else tiny_encoder(kind)

    served = _causal(kind, transformers.AutoModelForCausalLM) if kind == "llama" else tiny_encoder(kind, "SEQ_CLS")
    base = ResidentBase(served, name=kind)
    targets = DECODER_TARGETS["llama"] if kind == "llama" else [*ATTENTION[kind], "dense"]
    make, adapters, wishes, expected = random.Random(1), {}, [], []
    configs = (
        peft.LoraConfig(task_type="FEATURE_EXTRACTION", target_modules=targets),
        peft.PromptTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=3),
    )
    for config in configs:
        model = adapted(bare(), config)
        adapter, summary = compiled(files_of(model), base)
        adapters[adapter.id] = adapter
        assert summary.head is None
        for reading in (Reading.FIRST, Reading.LAST, Reading.MEAN):
            if reading is Reading.FIRST and kind == "llama":
                continue  # a decoder's first position is its prompt's: virtual tokens are keys and values there
            prompt = random_prompt(make, VOCAB, low=8)
            states = own_states(model, prompt)
            own = {Reading.FIRST: states[:1], Reading.LAST: states[-1:]}
            wishes.append(Wish(reading, prompt, adapter=adapter.id))
            expected.append(own.get(reading, states[-len(prompt) :].mean(dim=0, keepdim=True)))
    driver = ReadingDriver(base, adapters, max_step_tokens=9)
    for rows, own in zip(driver.read(wishes), expected, strict=True):
        torch.testing.assert_close(torch.tensor(rows), own, rtol=1e-4, atol=2e-5)


# ---- what is refused, and what fails alone


def test_a_reading_without_a_head_fails_alone() -> None:
    model = tiny_encoder("bert", "SEQ_CLS")
    base = ResidentBase(tiny_encoder("bert"), name="bert")
    batch = Batch(base)
    batch.add("lora", adapted(model, lora("bert", task_type="SEQ_CLS")), "SEQ_CLS")
    (adapter,) = batch.adapters
    wishes = [*batch.wishes, Wish(Reading.SEQUENCE, (5, 6)), Wish(Reading.TOKENS, (5, 6), adapter=adapter)]
    *fine, no_head, other_task = ReadingDriver(base, batch.adapters).read(wishes)
    assert isinstance(no_head, InvalidParameter)
    assert isinstance(other_task, InvalidParameter)
    for rows, own in zip(fine, batch.expected, strict=True):
        torch.testing.assert_close(torch.tensor(rows), own, rtol=1e-4, atol=2e-5)


def _refused(model: Any, base: ResidentBase) -> str:
    with pytest.raises(AdapterInvalid) as refusal:
        compiled(files_of(model), base)
    return str(refusal.value.errors)


def test_a_head_that_runs_through_a_pooler_the_base_lacks_is_refused() -> None:
    model = adapted(tiny_encoder("deberta-v2", "SEQ_CLS"), lora("deberta-v2", task_type="SEQ_CLS"))
    reasons = _refused(model, ResidentBase(tiny_encoder("deberta-v2"), name="deberta"))
    assert "pooler.dense.weight" in reasons
    assert "modules_to_save" in reasons
    own = ResidentBase(tiny_encoder("deberta-v2", "SEQ_CLS"), name="deberta")
    assert compiled(files_of(model), own)[1].head == HeadFacts("SEQ_CLS", 2)


def test_a_text_adapter_is_refused_where_no_text_is_generated() -> None:
    model = adapted(_causal("llama", transformers.AutoModelForCausalLM), peft.LoraConfig(task_type="CAUSAL_LM"))
    base = ResidentBase(_causal("llama", transformers.AutoModelForSequenceClassification), name="classifier")
    assert "generates no text" in _refused(model, base)


def test_a_head_on_an_encoder_decoder_is_refused_by_name() -> None:
    sizes = {"vocab_size": VOCAB, "d_model": HIDDEN, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    config = transformers.T5Config(**sizes, decoder_start_token_id=0)
    base = ResidentBase(transformers.T5ForConditionalGeneration(config), name="t5")
    model = adapted(
        transformers.T5ForTokenClassification(config), peft.LoraConfig(task_type="TOKEN_CLS", target_modules=["q"])
    )
    assert "encoder-decoder" in _refused(model, base)
