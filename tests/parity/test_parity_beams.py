"""Beam search, log-probabilities of prompts and logit bias over HTTP: what transformers gives, in mixed batches.

Searches of every kind, greedy rows and sampled rows run at the same time, on the base and on adapters of many methods.
"""

from __future__ import annotations

import asyncio
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.adapters.checkpoints import SEQ2SEQ, make_checkpoint
from tests.parity.asking import generate_all, ids_of
from tests.parity.bases import lively_base, save_tiny_base, word_codec, words
from tests.parity.served import ServedModel
from tests.parity.test_parity_http import as_zip

KINDS = ("llama", "gpt2", "t5", "bart")
METHODS = ("lora", "ia3", "lora_dora", "prompt_tuning", "prefix_tuning")
PROMPTS = ([9, 30, 12, 41, 5], [17] * 3 + [8, 22, 60, 33, 10, 11, 12, 13, 14, 15], [63])
NUM_NEW = 9
SEARCHES: tuple[dict[str, Any], ...] = (
    {"num_beams": 3},
    {"num_beams": 4, "length_penalty": 2.0, "early_stopping": True, "logit_bias": {"1": 4.0}},  # 1 ends an answer
    {"num_beams": 2, "length_penalty": -0.5, "early_stopping": "never", "min_new_tokens": 4},
    {"num_beams": 5, "length_penalty": 0.0, "repetition_penalty": 1.3, "early_stopping": "never"},
    {"num_beams": 3, "length_penalty": 0.5, "logit_bias": {"1": 5.0, "20": 1.0}},
)
Sequence = tuple[tuple[int, ...], float]


@torch.no_grad()
def searched(model: Any, prompt: list[int], search: dict[str, Any]) -> list[Sequence]:
    """All beams that `generate` returns, with their scores; padding left out."""
    ids = torch.tensor([prompt])
    bias = search.get("logit_bias")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NUM_NEW,
            do_sample=False,
            sequence_bias=None if bias is None else as_pairs(bias),
            num_return_sequences=search["num_beams"],
            return_dict_in_generate=True,
            output_scores=True,
            eos_token_id=1,
            pad_token_id=0,
            **{name: value for name, value in search.items() if name != "logit_bias"},
        )
    skipped = 1 if model.config.is_encoder_decoder else len(prompt)
    sequences = []
    for row, score in zip(made.sequences.tolist(), made.sequences_scores.tolist(), strict=True):
        new = row[skipped:]
        sequences.append((tuple(new[: new.index(1) + 1] if 1 in new else new), score))
    return sequences


def as_pairs(bias: dict[str, float]) -> list[list[Any]]:
    """A `logit_bias` as transformers takes it."""
    return [[[int(i)], value] for i, value in bias.items()]


def told(answer: dict[str, Any]) -> list[Sequence]:
    """The beams of an answer, the best first."""
    details = answer["details"]
    every = [details, *(details["best_of_sequences"] or ())]
    return [(tuple(token["id"] for token in each["tokens"]), each["score"]) for each in every]


Call = tuple[str, list[int], dict[str, Any]]


async def ask_all(url: str, calls: list[Call]) -> list[dict[str, Any]]:
    def body(prompt: list[int], parameters: dict[str, Any]) -> dict[str, Any]:
        return {"inputs": words(prompt), "parameters": {"max_new_tokens": NUM_NEW, "details": True, **parameters}}

    return await generate_all(url, [(name, body(prompt, parameters)) for name, prompt, parameters in calls])


@pytest.mark.parametrize("base_kind", KINDS)
def test_beams_equal_peft_among_greedy_and_sampled_rows(base_kind: str, tmp_path: Path) -> None:
    save_tiny_base(base_kind, tmp_path / "base")
    expected: dict[tuple[str, int, int], list[Sequence]] = {}
    settings: dict[str, Any] = {"max_rows": 24, "max_step_tokens": 64, "max_step_adapters": 8, "block_size": 4}
    codec = word_codec(is_encoder_decoder=base_kind in SEQ2SEQ)
    with ServedModel(tmp_path / "base", tmp_path / "store", codec=codec, **settings) as served:
        for at, method in enumerate(("base", *METHODS)):
            name, model = method.replace("_", "-"), lively_base(base_kind)
            if method != "base":
                files, model = make_checkpoint(method, base_kind, seed=300 + at, base=model)
                headers = {"content-type": "application/zip"}
                assert served.client.put(f"/adapters/{name}", content=as_zip(files), headers=headers).is_success
            for i, prompt in enumerate(PROMPTS):
                which = (at + i) % len(SEARCHES)
                expected[name, i, which] = searched(model, prompt, SEARCHES[which])
        searches = [(name, PROMPTS[i], SEARCHES[s] | {"best_of": SEARCHES[s]["num_beams"]}) for name, i, s in expected]
        others: list[Call] = [(name, PROMPTS[i], {"do_sample": s == 1, "seed": 5}) for name, i, s in expected]
        alone = [asyncio.run(ask_all(served.url, [call]))[0] for call in others[::4]]
        given = asyncio.run(ask_all(served.url, [*searches, *others]))
    for (key, beams), answer in zip(expected.items(), given, strict=False):
        assert [ids for ids, _ in told(answer)] == [ids for ids, _ in beams], key
        assert [score for _, score in told(answer)] == pytest.approx([score for _, score in beams], rel=1e-4), key
    assert [ids_of(answer) for answer in given[len(searches) :: 4]] == [ids_of(answer) for answer in alone]
    lengths = {len(ids) for beams in expected.values() for ids, _ in beams}
    assert len(lengths) > 2, "beams end at different places"


@pytest.mark.parametrize("base_kind", ["llama", "gpt2"])
def test_log_probabilities_of_a_prompt_are_the_models(base_kind: str, tmp_path: Path) -> None:
    save_tiny_base(base_kind, tmp_path / "base")
    settings: dict[str, Any] = {"max_step_tokens": 16, "block_size": 4, "codec": word_codec(is_encoder_decoder=False)}
    with ServedModel(tmp_path / "base", tmp_path / "store", **settings) as s:
        models = {"base": lively_base(base_kind)}
        for at, method in enumerate(("lora", "prompt_tuning")):
            files, model = make_checkpoint(method, base_kind, seed=40 + at, base=lively_base(base_kind))
            name = method.replace("_", "-")
            headers = {"content-type": "application/zip"}
            assert s.client.put(f"/adapters/{name}", content=as_zip(files), headers=headers).is_success
            models[name] = model
        calls: list[Call] = [(n, p, {"decoder_input_details": True}) for n in models for p in PROMPTS]
        given = asyncio.run(ask_all(s.url, calls * 2))  # the second time much could be found in the prefix cache
        for (name, prompt, _), answer in zip(calls * 2, given, strict=True):
            prefill = answer["details"]["prefill"]
            assert [token["id"] for token in prefill] == prompt
            assert prefill[0]["logprob"] is None
            own = [token["logprob"] for token in prefill[1:]]
            assert own == pytest.approx(_logprobs(models[name], prompt), rel=1e-4, abs=1e-5)
        body = {"model": "lora", "prompt": PROMPTS[1], "max_tokens": 0, "echo": True, "logprobs": 3, "temperature": 0}
        answer = s.client.post("/v1/completions", json=body).json()["choices"][0]
    assert answer["text"] == words(PROMPTS[1])
    assert answer["finish_reason"] == "length"
    assert answer["logprobs"]["token_logprobs"][0] is None
    wanted = _logprobs(models["lora"], PROMPTS[1])
    assert answer["logprobs"]["token_logprobs"][1:] == pytest.approx(wanted, rel=1e-4, abs=1e-5)
    for top, own in zip(answer["logprobs"]["top_logprobs"][1:], wanted, strict=True):
        assert max(top.values()) >= own - 1e-4
        assert len(top) in (3, 4)


@torch.no_grad()
def _logprobs(model: Any, prompt: list[int]) -> list[float]:
    """Of each token of the prompt behind the first; virtual tokens stand in front of both."""
    logits = model(input_ids=torch.tensor([prompt])).logits[0, -len(prompt) :]
    return [float(row[i]) for row, i in zip(logits.log_softmax(-1), prompt[1:], strict=False)]


@pytest.mark.parametrize("base_kind", ["llama", "t5"])
def test_a_bias_acts_as_transformers_sequence_bias(base_kind: str, tmp_path: Path) -> None:
    save_tiny_base(base_kind, tmp_path / "base")
    model, prompt = lively_base(base_kind), PROMPTS[0]
    codec = word_codec(is_encoder_decoder=base_kind in SEQ2SEQ)
    with ServedModel(tmp_path / "base", tmp_path / "store", codec=codec) as served:
        plain = asyncio.run(ask_all(served.url, [("base", prompt, {})]))[0]
        bias = {str(ids_of(plain)[0]): -100.0, "20": 2.5, "33": 1.25}
        calls: list[Call] = [
            ("base", prompt, {"logit_bias": bias}),
            ("base", prompt, {"logit_bias": bias, "num_beams": 3, "best_of": 3}),
            ("base", prompt, {}),
        ]
        greedy, beams, again = asyncio.run(ask_all(served.url, calls))
    assert told(beams) == _approx(searched(model, prompt, {"num_beams": 3, "logit_bias": bias}))
    ids = torch.tensor([prompt])
    made = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NUM_NEW,
        do_sample=False,
        sequence_bias=as_pairs(bias),
        eos_token_id=1,
        pad_token_id=0,
    )[0].tolist()
    made = made[1:] if base_kind in SEQ2SEQ else made[len(prompt) :]
    assert ids_of(greedy) == (made[: made.index(1) + 1] if 1 in made else made)
    assert ids_of(again) == ids_of(plain)
    assert ids_of(greedy) != ids_of(plain)


def _approx(sequences: list[Sequence]) -> list[Any]:
    return [(ids, pytest.approx(score, rel=1e-4)) for ids, score in sequences]
