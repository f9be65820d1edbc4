"""Constrained rows in mixed batches on real bases: transformers' tokens under the same mask; nobody else's change."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, LogitsProcessor

from peft_serve.api.constraints import Constraints
from peft_serve.api.forms import Form
from peft_serve.core import Constraint
from peft_serve.grammars.compiler import GrammarCompiler
from peft_serve.grammars.grammar import Grammar, of_choice, of_json_schema, of_regex
from peft_serve.model.loader import locate
from tests.parity.served import ServedModel

SCHEMA = {
    "type": "object",
    "properties": {"mood": {"enum": ["angry", "happy"]}, "stars": {"type": "integer", "minimum": 1, "maximum": 5}},
    "required": ["mood", "stars"],
    "additionalProperties": False,
}
PROMPTS = ("Text : I want my money back Emotion :", "Query : what is the weather in Rome Topic :")
FORMS: tuple[tuple[dict[str, Any], Grammar], ...] = (
    ({"json_schema": SCHEMA}, of_json_schema(SCHEMA)),
    ({"regex": "[A-Z][a-z]{2,8}( [a-z]+){1,3}[.!]"}, of_regex("[A-Z][a-z]{2,8}( [a-z]+){1,3}[.!]")),
    ({"grammar": {"type": "regex", "value": "(yes|no|maybe)"}}, of_choice(["yes", "no", "maybe"])),
)
NUM_NEW = 24


class Masked(LogitsProcessor):
    """The mask of the answer so far, on logits of one sequence."""

    def __init__(self, constraint: Constraint, num_prompt: int) -> None:
        self._constraint = constraint
        self._num_prompt = num_prompt

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        matcher = self._constraint.start()
        matcher.mask()
        for token in input_ids[0, self._num_prompt :].tolist():
            matcher.accept(token)
        mask = matcher.mask()
        allowed = [bool(mask[i // 8] >> (i % 8) & 1) for i in range(scores.shape[1])]
        return scores.masked_fill(~torch.tensor([allowed]), float("-inf"))  # type: ignore[return-value]


@pytest.fixture(scope="module", params=["demo-llama", "demo-t5"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedModel]:
    with ServedModel(request.param, tmp_path_factory.mktemp("store"), kv_cache_bytes=64 << 20) as made:
        yield made


async def asked(url: str, bodies: list[dict[str, Any]]) -> list[list[int]]:
    """All of them at the same time; the ids of each answer."""

    async def ask(client: httpx.AsyncClient, body: dict[str, Any]) -> list[int]:
        answer = await client.post("/generate", json=body)
        assert answer.status_code == 200, answer.text
        return [token["id"] for token in answer.json()["details"]["tokens"]]

    async with httpx.AsyncClient(base_url=url, timeout=120) as client:
        return list(await asyncio.gather(*(ask(client, body) for body in bodies)))


def body(prompt: str, **parameters: Any) -> dict[str, Any]:
    return {"inputs": prompt, "parameters": {"max_new_tokens": NUM_NEW, "details": True, **parameters}}


@torch.no_grad()
def oracle(served: ServedModel, model: Any, prompt: str, grammar: Grammar) -> list[int]:
    """transformers' greedy answer under the grammar's mask."""
    assert served.parts is not None
    parts, card = served.parts, served.parts.base
    constraints = Constraints(GrammarCompiler(), vocab_size=card.vocab_size, max_bytes=10_000)
    constraint = asyncio.run(constraints.of(Form(grammar, "x"), parts.codec, card.eos_ids))
    ids = torch.tensor([parts.codec.encode(prompt)])
    num_prompt = 1 if card.is_encoder_decoder else ids.shape[1]
    made = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NUM_NEW,
        do_sample=False,
        logits_processor=[Masked(constraint, num_prompt)],
    )[0].tolist()[num_prompt:]
    ends = [i for i, token in enumerate(made) if token in card.eos_ids]
    return list(made[: ends[0] + 1] if ends else made)


async def test_a_mixed_batch_gives_everybody_their_own(served: ServedModel) -> None:
    free = [body(prompt) for prompt in PROMPTS]
    free.append(body(PROMPTS[0], do_sample=True, seed=5))
    alone = [(await asked(served.url, [one]))[0] for one in free]
    held = [body(prompt, **said) for prompt in PROMPTS for said, _ in FORMS]
    together = await asked(served.url, [*held, *free, *held])
    assert together[len(held) : len(held) + len(free)] == alone
    assert served.parts is not None
    kind = AutoModelForSeq2SeqLM if served.parts.base.is_encoder_decoder else AutoModelForCausalLM
    model = kind.from_pretrained(locate(served.settings.model), dtype=torch.float32)
    expected = await asyncio.to_thread(
        lambda: [oracle(served, model, prompt, grammar) for prompt in PROMPTS for _, grammar in FORMS]
    )
    assert together[: len(held)] == expected
    assert together[len(held) + len(free) :] == expected


async def test_samples_of_one_prompt_have_a_matcher_each(served: ServedModel) -> None:
    many = body(PROMPTS[0], regex="(yes|no|maybe)", do_sample=True, temperature=3.0, best_of=4, seed=1)
    one = [body(PROMPTS[0], regex="(yes|no|maybe)", do_sample=True, temperature=3.0, seed=1 + i) for i in range(4)]
    async with httpx.AsyncClient(base_url=served.url, timeout=120) as client:
        details = (await client.post("/generate", json=many)).json()["details"]
    told = [details, *details["best_of_sequences"]]
    ids = sorted([token["id"] for token in each["tokens"]] for each in told)
    assert ids == sorted(await asked(served.url, one))
    assert {each["finish_reason"] for each in told} == {"eos_token"}
