"""Adapters on the fused experts of a mixture, over HTTP and side by side with others: the tokens are peft's."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.adapters.checkpoints import MIXTURES, make_checkpoint, methods_for
from tests.parity.bases import lively_base, save_tiny_base, word_codec
from tests.parity.greedy_oracle import greedy
from tests.parity.served import ServedModel
from tests.parity.test_parity_http import NUM_NEW, PROMPTS, as_zip, ask_all

METHODS = ("lora", "lora_tokens", "lora_experts", "lora_experts_both", "lora_router", "lora_mixture")


@pytest.mark.parametrize("base_kind", MIXTURES)
def test_tokens_equal_peft_on_a_mixture_of_experts(base_kind: str, tmp_path: Path) -> None:
    save_tiny_base(base_kind, tmp_path / "base")
    models = {"base": lively_base(base_kind)}
    codec = word_codec(is_encoder_decoder=False)
    with ServedModel(tmp_path / "base", tmp_path / "store", codec=codec) as served:
        for seed, method in enumerate(method for method in METHODS if method in methods_for(base_kind)):
            name = method.replace("_", "-")
            files, models[name] = make_checkpoint(method, base_kind, seed=seed, base=lively_base(base_kind))
            headers = {"content-type": "application/zip"}
            answer = served.client.put(f"/adapters/{name}", content=as_zip(files), headers=headers)
            assert answer.status_code == 201, (method, answer.text)
        calls = [(name, i) for name in models for i in range(len(PROMPTS))]
        given = asyncio.run(ask_all(served.url, [(name, PROMPTS[i]) for name, i in calls], frozenset()))
    answers = dict(zip(calls, given, strict=True))
    expected = {
        (name, i): greedy(models[name], [PROMPTS[i]], [tokens], num_new=NUM_NEW)[0]
        for (name, i), tokens in answers.items()
    }
    assert answers == expected
    moved = {name for name, i in expected if expected[name, i] != expected["base", i]}
    assert {"lora-experts", "lora-experts-both", "lora-router"} <= moved
