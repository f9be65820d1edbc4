"""Soft prompts and KV prefixes give what the library gives when they are put in front by hand."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel

from peft_serve.adapters.primitives import Adapter, KVPrefix, SoftPrompt
from peft_serve.core import BASE, AdapterId
from peft_serve.model.base import ResidentBase
from tests.model.driver import Driver, Job, random_jobs
from tests.model.tiny_models import SEQ2SEQ, VOCAB, tiny

PROMPT, PREFIX, BOTH = (AdapterId(f"sha256:{name}") for name in ("prompt", "prefix", "both"))
CAUSAL_NAMES = ("llama", "qwen2", "gemma", "gemma2", "gpt2", "opt", "gpt_neox")


def adapters_for(base: ResidentBase) -> dict[AdapterId, Adapter]:
    torch.manual_seed(5)
    shape = base.shape
    prompt = SoftPrompt(torch.randn(6, shape.hidden_size))

    def prefix(length: int) -> KVPrefix:
        size = (shape.num_layers, shape.num_kv_heads, length, shape.head_dim)
        return KVPrefix(torch.randn(size), torch.randn(size))

    return {
        PROMPT: Adapter(id=PROMPT, method="PROMPT_TUNING", prompt=prompt),
        PREFIX: Adapter(id=PREFIX, method="PREFIX_TUNING", prefix=prefix(7)),
        BOTH: Adapter(id=BOTH, method="BOTH", prompt=prompt, prefix=prefix(4)),
    }


def cache_of(prefix: KVPrefix | None) -> DynamicCache:
    cache = DynamicCache()
    if prefix is not None:
        for layer in range(prefix.keys_LHPD.shape[0]):
            cache.update(prefix.keys_LHPD[layer][None], prefix.values_LHPD[layer][None], layer)
    return cache


@torch.no_grad()
def greedy(model: PreTrainedModel, job: Job, adapter: Adapter) -> list[int]:
    """Greedy decoding of one row, with nothing but the library's forward and its caches."""
    cache: Any = cache_of(adapter.prefix)
    inputs: dict[str, Any] = {}
    is_seq2seq = model.config.is_encoder_decoder
    if is_seq2seq:
        cache = EncoderDecoderCache(cache, DynamicCache())
        embedded = model.get_encoder().embed_tokens(torch.tensor([job.source]))
        if adapter.prompt is not None:
            embedded = torch.cat((adapter.prompt.embeddings_PD[None], embedded), dim=1)
        inputs["encoder_outputs"] = model.get_encoder()(inputs_embeds=embedded)
    output: list[int] = []
    at = cache.get_seq_length()
    fed: Tensor = torch.tensor([job.prompt])
    if not is_seq2seq and adapter.prompt is not None:
        embeddings = adapter.prompt.embeddings_PD[None]
        positions = torch.arange(at, at + embeddings.shape[1])[None]
        model(inputs_embeds=embeddings, past_key_values=cache, position_ids=positions, use_cache=True)
        at = cache.get_seq_length()
    while len(output) < job.num_new:
        if is_seq2seq:
            out = model(decoder_input_ids=fed, past_key_values=cache, use_cache=True, **inputs)
        else:
            positions = torch.arange(at, at + fed.shape[1])[None]
            out = model(input_ids=fed, past_key_values=cache, position_ids=positions, use_cache=True)
        at += fed.shape[1]
        output.append(int(out.logits[0, -1].argmax()))
        fed = torch.tensor([[output[-1]]])
    return output


def check(name: str, ids: tuple[AdapterId, ...]) -> None:
    base = ResidentBase(tiny(name), name=name)
    adapters = adapters_for(base)
    driver = Driver(base, adapters, seed=3)
    assert driver.install(*ids).failed_installs == ()
    adapters[BASE] = Adapter(id=BASE, method="none")
    start = base.decoder_start_ids
    around = (BASE, *ids)
    jobs = random_jobs(
        random.Random(7),
        count=8,
        vocab=VOCAB,
        start=start,
        has_source=bool(start),
        adapter=lambda i: around[i % len(around)],
    )
    driver.finish(jobs)
    model = tiny(name)
    assert [job.output for job in jobs] == [greedy(model, job, adapters[job.adapter]) for job in jobs]
    plain = greedy(model, jobs[1], adapters[BASE])
    assert jobs[1].output != plain, "an adapter that changes nothing proves nothing"


@pytest.mark.parametrize("name", CAUSAL_NAMES)
def test_decoder_only_prefixes_and_prompts(name: str) -> None:
    check(name, (PROMPT, PREFIX, BOTH))


@pytest.mark.parametrize("name", SEQ2SEQ)
def test_encoder_decoder_prefixes_and_prompts(name: str) -> None:
    check(name, (PROMPT, PREFIX, BOTH))


def test_a_removed_adapter_leaves_no_prompt_behind() -> None:
    base = ResidentBase(tiny("t5"), name="t5")
    driver = Driver(base, adapters_for(base))
    driver.install(PROMPT)
    job = Job(prompt=(0,), source=(8, 9, 10), num_new=5, adapter=PROMPT)
    driver.finish([job])
    driver.run(removes=(1,))
    after = Job(prompt=(0,), source=(8, 9, 10), num_new=5)
    driver.finish([after])
    alone = greedy(tiny("t5"), after, Adapter(id=BASE, method="none"))
    assert after.output == alone != job.output
