"""Models of more kinds give, side by side, token for token what the library's own `generate` gives alone."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import peft
import pytest
from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

from peft_serve.adapters.compiler import compile_adapter
from peft_serve.adapters.gate import inspect
from peft_serve.adapters.limits import GateLimits
from peft_serve.adapters.primitives import Adapter
from peft_serve.core import BASE, AdapterId
from peft_serve.model.base import ResidentBase
from peft_serve.model.families.registry import is_known
from peft_serve.model.loader import NotServable, load_base, wrap
from peft_serve.model.self_check import difference, probe
from tests.adapters.checkpoints import randomise, save
from tests.model.driver import Driver, random_jobs
from tests.model.test_generation import assert_alone, expected
from tests.model.tiny_models import VOCAB, t5_sizes
from tests.model.tiny_more import MORE, MORE_CAUSAL, MORE_SEQ2SEQ, tiny_more

# Older versions of the library script a function of GPT-BigCode when they import it.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script. is deprecated:DeprecationWarning")


@pytest.mark.parametrize("name", MORE_CAUSAL)
def test_decoder_only_rows_get_what_they_would_get_alone(name: str) -> None:
    driver = Driver(ResidentBase(tiny_more(name), name=name), seed=1)
    jobs = random_jobs(random.Random(2), count=7, vocab=VOCAB)
    driver.finish(jobs)
    assert_alone(tiny_more(name), jobs)
    assert len({tuple(job.output) for job in jobs}) > 1, "the jobs must not all say the same"


@pytest.mark.parametrize("name", MORE_SEQ2SEQ)
def test_encoder_decoder_rows_get_what_they_would_get_alone(name: str) -> None:
    base = ResidentBase(tiny_more(name), name=name)
    driver = Driver(base, seed=1)
    jobs = random_jobs(random.Random(3), count=7, vocab=VOCAB, start=base.decoder_start_ids, has_source=True)
    driver.finish(jobs[:3])  # later rows join a step with rows whose source is already encoded
    driver.finish(jobs)
    assert_alone(tiny_more(name), jobs)
    assert len({tuple(job.output) for job in jobs}) > 1, "the jobs must not all say the same"


@pytest.mark.parametrize("name", MORE)
def test_logits_differ_from_the_models_own_by_rounding_only(name: str) -> None:
    model = tiny_more(name)
    assert is_known(model.config.model_type)
    probes = probe(model)
    assert difference(ResidentBase(model, name=name), probes) < 3e-5


@pytest.mark.parametrize(
    "name", ["falcon-slopes", "bloom", "mpt", "gptj", "marian", "m2m_100", "mixtral", "gemma3_text"]
)
def test_a_folder_of_such_a_model_is_loaded_and_checked(name: str, tmp_path: Path) -> None:
    tiny_more(name).save_pretrained(tmp_path)
    said: list[str] = []
    base = load_base(str(tmp_path), dtype="float32", device="cpu", on_progress=said.append)
    assert base.family == tiny_more(name).config.model_type
    assert "largest difference" in said[-1]
    assert base.fingerprint() == base.fingerprint()


NO_PREFIX = ("falcon", "mpt", "marian", "m2m_100")  # peft's own prefix does not fit their caches, or tiny ones of them
ADAPTED = ("phi", "gemma3_text", "cohere2", "qwen2_moe", "gpt_bigcode", "gptj", "bloom", "falcon-slopes", *NO_PREFIX)


def peft_configs(name: str) -> list[peft.PeftConfig]:
    task = "SEQ_2_SEQ_LM" if name in MORE_SEQ2SEQ else "CAUSAL_LM"
    configs: list[peft.PeftConfig] = [
        peft.LoraConfig(r=3, lora_alpha=6, target_modules="all-linear", task_type=task),
        peft.PromptTuningConfig(num_virtual_tokens=3, num_attention_heads=4, task_type=task),
    ]
    if name not in NO_PREFIX:
        configs.append(peft.PrefixTuningConfig(num_virtual_tokens=5, task_type=task))
    return configs


@pytest.mark.filterwarnings("ignore")  # what peft and the library say about each other
@pytest.mark.parametrize("name", ADAPTED)
def test_rows_with_adapters_get_what_peft_gives_alone(name: str) -> None:
    base = ResidentBase(tiny_more(name), name=name)
    oracles: dict[AdapterId, Any] = {BASE: tiny_more(name)}
    adapters: dict[AdapterId, Adapter] = {}
    for seed, config in enumerate(peft_configs(name)):
        oracle: Any = peft.get_peft_model(tiny_more(name), config)
        randomise(oracle, seed)
        adapter = compile_adapter(inspect(save(oracle), base, GateLimits()), base, GateLimits())
        adapters[adapter.id] = adapter
        oracles[adapter.id] = oracle.eval()
    driver = Driver(base, adapters, seed=1)
    driver.install(*adapters)
    ids = [BASE, *adapters]
    is_seq2seq = name in MORE_SEQ2SEQ
    jobs = random_jobs(
        random.Random(2),
        count=6,
        vocab=VOCAB,
        start=base.decoder_start_ids,
        has_source=is_seq2seq,
        adapter=lambda i: ids[i % len(ids)],
    )
    driver.finish(jobs)
    for job in jobs:
        output, logprobs = expected(oracles[job.adapter], job)
        assert job.output == output, job.adapter
        assert job.logprobs == pytest.approx(logprobs, abs=2e-4)


def test_experts_with_a_capacity_are_refused() -> None:
    config = SwitchTransformersConfig(**t5_sizes(num_experts=4))
    with pytest.raises(NotServable, match="which tokens they drop depends on the requests of a batch"):
        wrap(SwitchTransformersForConditionalGeneration(config), name="switch")


def test_what_the_generation_configuration_forbids_is_never_said() -> None:
    base = ResidentBase(tiny_more("marian"), name="marian")
    plain = random_jobs(random.Random(3), count=5, vocab=VOCAB, start=base.decoder_start_ids, has_source=True)
    Driver(base, seed=1).finish(plain)
    banned = sorted({job.output[0] for job in plain} | {job.output[3] for job in plain})
    model, oracle = tiny_more("marian"), tiny_more("marian")
    for one in (model, oracle):
        one.generation_config.bad_words_ids = [[i] for i in banned]
    base = ResidentBase(model, name="marian")
    assert base.banned_ids == tuple(banned)
    jobs = random_jobs(random.Random(3), count=5, vocab=VOCAB, start=base.decoder_start_ids, has_source=True)
    Driver(base, seed=1).finish(jobs)
    assert_alone(oracle, jobs)
    assert not {i for job in jobs for i in job.output} & set(banned)
