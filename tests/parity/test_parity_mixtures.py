"""Adapters on the fused experts of a mixture, over HTTP and side by side with others: the tokens are peft's."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.adapters.checkpoints import MIXTURES, make_checkpoint, methods_for
from tests.parity.bases import lively_base, save_tiny_base, word_codec
from tests.parity.served import ServedModel
from tests.parity.test_parity_http import PROMPTS, as_zip, ask_all, oracle_tokens

METHODS = ("lora", "lora_tokens", "lora_experts", "lora_experts_both", "lora_router", "lora_mixture")


@pytest.mark.parametrize("base_kind", MIXTURES)
def test_tokens_equal_peft_on_a_mixture_of_experts(base_kind: str, tmp_path: Path) -> None:
    save_tiny_base(base_kind, tmp_path / "base")
    expected = {("base", i): oracle_tokens(lively_base(base_kind), [prompt])[0] for i, prompt in enumerate(PROMPTS)}
    codec = word_codec(is_encoder_decoder=False)
    with ServedModel(tmp_path / "base", tmp_path / "store", codec=codec) as served:
        for seed, method in enumerate(method for method in METHODS if method in methods_for(base_kind)):
            name = method.replace("_", "-")
            files, model = make_checkpoint(method, base_kind, seed=seed, base=lively_base(base_kind))
            expected |= {(name, i): oracle_tokens(model, [prompt])[0] for i, prompt in enumerate(PROMPTS)}
            headers = {"content-type": "application/zip"}
            answer = served.client.put(f"/adapters/{name}", content=as_zip(files), headers=headers)
            assert answer.status_code == 201, (method, answer.text)
        given = asyncio.run(ask_all(served.url, [(name, PROMPTS[i]) for name, i in expected], frozenset()))
    assert dict(zip(expected, given, strict=True)) == expected
    moved = {name for name, i in expected if expected[name, i] != expected["base", i]}
    assert {"lora-experts", "lora-experts-both", "lora-router"} <= moved
