"""Every method on every kind of base, uploaded over HTTP and asked all at once: the tokens are peft's.

peft, one request at a time, is the oracle. The server gets freshly made checkpoints, and then every request at
the same time, so that rows of all methods and of the base share steps.
"""

from __future__ import annotations

import asyncio
import io
import tarfile
import warnings
import zipfile
from pathlib import Path
from typing import Any

import httpx
import peft
import pytest
import torch

from peft_serve.adapters.records import CONFIG_FILE, WEIGHTS_FILE, CheckpointFiles
from tests.adapters.checkpoints import BASE_KINDS, SEQ2SEQ, first_task, make_checkpoint, telling_methods_for
from tests.parity.bases import lively_base, save_tiny_base, word_codec, words
from tests.parity.served import ServedModel

NUM_NEW = 12
PROMPTS = ([9, 30, 12, 41, 5], [17] * 3 + [8, 22, 60, 33, 10, 11, 12, 13, 14, 15], [63], [40, 41, 42, 43, 44, 45, 46])


def as_zip(files: CheckpointFiles) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"checkpoint/{CONFIG_FILE}", files.config)
        archive.writestr(f"checkpoint/{WEIGHTS_FILE}", files.weights)
        archive.writestr("checkpoint/README.md", "a card")
    return buffer.getvalue()


def as_tar(files: CheckpointFiles) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in ((CONFIG_FILE, files.config), (WEIGHTS_FILE, files.weights)):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


@torch.no_grad()
def oracle_tokens(model: Any, prompt: list[int]) -> list[int]:
    """What peft (or transformers) generates greedily, end-of-sequence id included, prompt and start left out."""
    ids = torch.tensor([prompt])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NUM_NEW,
            do_sample=False,
            num_beams=1,
            eos_token_id=1,
            pad_token_id=0,
            **(first_task(model) if isinstance(model, peft.PeftModel) else {}),
        )[0].tolist()
    made = made[1:] if model.config.is_encoder_decoder else made[len(prompt) :]
    return made[: made.index(1) + 1] if 1 in made else made


async def ask_all(url: str, calls: list[tuple[str, list[int]]], with_tasks: frozenset[str]) -> list[list[int]]:
    """Every call at the same time; the generated ids of each. Adapters `with_tasks` are asked for their first task."""

    async def ask(client: httpx.AsyncClient, name: str, prompt: list[int]) -> list[int]:
        task = {"task_id": 0} if name in with_tasks else {}
        body = {"inputs": words(prompt), "parameters": {"max_new_tokens": NUM_NEW, "details": True, **task}}
        answer = await client.post("/generate", params={"adapter": name}, json=body)
        assert answer.status_code == 200, (name, answer.text)
        return [token["id"] for token in answer.json()["details"]["tokens"]]

    async with httpx.AsyncClient(base_url=url, timeout=120, limits=httpx.Limits(max_connections=200)) as client:
        return list(await asyncio.gather(*(ask(client, name, prompt) for name, prompt in calls)))


@pytest.mark.timeout(900)
@pytest.mark.parametrize("base_kind", BASE_KINDS)
def test_tokens_equal_peft_in_one_mixed_batch(base_kind: str, tmp_path: Path) -> None:
    save_tiny_base(base_kind, tmp_path / "base")
    names = {method: method.replace("_", "-") for method in telling_methods_for(base_kind)}
    expected: dict[tuple[str, int], list[int]] = {}
    with_tasks = set()
    plain = lively_base(base_kind)
    for i, prompt in enumerate(PROMPTS):
        expected["base", i] = oracle_tokens(plain, prompt)
    settings = {"max_rows": 48, "max_step_tokens": 128, "max_step_adapters": 24, "max_resident_adapters": 160}
    settings["block_size"] = 4  # so that a prompt fills some
    codec = word_codec(is_encoder_decoder=base_kind in SEQ2SEQ)
    with ServedModel(tmp_path / "base", tmp_path / "store", codec=codec, **settings) as served:
        for at, (method, name) in enumerate(names.items()):
            files, model = make_checkpoint(method, base_kind, seed=100 + at, base=lively_base(base_kind))
            if first_task(model):
                with_tasks.add(name)
            for i in (at % 2, 2 + at % 2):  # peft alone takes most of the time here: two prompts of the four for each
                expected[name, i] = oracle_tokens(model, PROMPTS[i])
            content, kind = (as_zip(files), "zip") if at % 2 else (as_tar(files), "gzip")
            answer = served.client.put(
                f"/adapters/{name}", content=content, headers={"content-type": f"application/{kind}"}
            )
            assert answer.status_code == 201, (method, answer.text)
            served.client.post(f"/adapters/{name}/load")  # so that rows need not wait for each other's adapters
        calls = sorted(expected, key=lambda call: call[1])
        given = asyncio.run(ask_all(served.url, [(name, PROMPTS[i]) for name, i in calls], frozenset(with_tasks)))
        again = given
        if base_kind not in SEQ2SEQ:
            again = asyncio.run(ask_all(served.url, [(name, PROMPTS[i]) for name, i in calls], frozenset(with_tasks)))
        metrics = served.client.get("/metrics").text
    assert again == given, "what is found in the prefix cache is what was computed"
    hits = next(line for line in metrics.splitlines() if line.startswith("vllm:prefix_cache_hits_total"))
    assert (float(hits.rsplit(" ", 1)[1]) > 0) == (base_kind not in SEQ2SEQ)
    answers = dict(zip(calls, given, strict=True))
    assert {call: tokens for call, tokens in answers.items() if tokens != expected[call]} == {}
    # The adapters must matter, or equality would say nothing; on two prompts some are not heard.
    moved = {name for (name, i), tokens in expected.items() if tokens != expected["base", i]}
    assert len(moved) >= 0.6 * len(names)
    buckets = [line for line in metrics.splitlines() if line.startswith("peft_serve_step_distinct_adapters_bucket")]
    few = next(float(line.rsplit(" ", 1)[1]) for line in buckets if 'le="4.0"' in line)
    assert few < float(buckets[-1].rsplit(" ", 1)[1]), "no step held more than four adapters"
