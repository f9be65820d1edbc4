"""Every method on every kind of base, uploaded over HTTP and asked all at once: the tokens are peft's.

peft, one adapter at a time, is the oracle. The server gets freshly made checkpoints, and then every request at
the same time, so that rows of all methods and of the base share steps.
"""

from __future__ import annotations

import asyncio
import io
import os
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

from peft_serve.adapters.records import CONFIG_FILE, WEIGHTS_FILE, CheckpointFiles
from tests.adapters.checkpoints import BASE_KINDS, SEQ2SEQ, first_task, make_checkpoint, telling_methods_for
from tests.parity.asking import generate_all, ids_of
from tests.parity.bases import lively_base, save_tiny_base, word_codec, words
from tests.parity.greedy_oracle import greedy
from tests.parity.served import ServedModel

NUM_NEW = int(os.environ.get("PEFT_SERVE_TEST_TOKENS", "8"))  # of each answer
PAIRS = (
    ([9, 30, 12, 41, 5], [40, 41, 42, 43, 44]),
    ([17] * 3 + [8, 22, 60, 33, 10, 11, 12, 13, 14, 15], [7, 50, *range(20, 31)]),
    ([63], [20]),
)
"""Every adapter is asked one pair. Prompts of a pair have one length, so that peft computes both in one batch, without
padding: peft by itself takes much of the time here."""
PROMPTS = tuple(prompt for pair in PAIRS for prompt in pair)
Call = tuple[str, int]
"""An adapter's name, and which of the prompts."""


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


async def ask_all(url: str, calls: list[tuple[str, list[int]]], with_tasks: frozenset[str]) -> list[list[int]]:
    """Every call at the same time; the generated ids of each. Adapters `with_tasks` are asked for their first task."""

    def body(name: str, prompt: list[int]) -> dict[str, Any]:
        task = {"task_id": 0} if name in with_tasks else {}
        return {"inputs": words(prompt), "parameters": {"max_new_tokens": NUM_NEW, "details": True, **task}}

    answers = await generate_all(url, [(name, body(name, prompt)) for name, prompt in calls])
    return [ids_of(answer) for answer in answers]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("base_kind", BASE_KINDS)
def test_tokens_equal_peft_in_one_mixed_batch(base_kind: str, tmp_path: Path) -> None:
    save_tiny_base(base_kind, tmp_path / "base")
    names = {method: method.replace("_", "-") for method in telling_methods_for(base_kind)}
    asked = [("base", lively_base(base_kind), pair) for pair in range(len(PAIRS))]
    with_tasks = set()
    settings = {"max_rows": 48, "max_step_tokens": 128, "max_step_adapters": 24, "max_resident_adapters": 160}
    settings["block_size"] = 4  # so that a prompt fills some
    codec = word_codec(is_encoder_decoder=base_kind in SEQ2SEQ)
    with ServedModel(tmp_path / "base", tmp_path / "store", codec=codec, **settings) as served:
        for at, (method, name) in enumerate(names.items()):
            files, model = make_checkpoint(method, base_kind, seed=100 + at, base=lively_base(base_kind))
            if first_task(model):
                with_tasks.add(name)
            asked.append((name, model, (at + BASE_KINDS.index(base_kind)) % len(PAIRS)))
            content, kind = (as_zip(files), "zip") if at % 2 else (as_tar(files), "gzip")
            answer = served.client.put(
                f"/adapters/{name}", content=content, headers={"content-type": f"application/{kind}"}
            )
            assert answer.status_code == 201, (method, answer.text)
            served.client.post(f"/adapters/{name}/load")  # so that rows need not wait for each other's adapters
        calls = sorted(((name, 2 * pair + i) for name, _, pair in asked for i in (0, 1)), key=lambda call: call[1])
        given = asyncio.run(ask_all(served.url, [(name, PROMPTS[i]) for name, i in calls], frozenset(with_tasks)))
        again = [call for call in calls if call[1] % 2 and base_kind not in SEQ2SEQ]  # one prompt of each pair
        found = asyncio.run(ask_all(served.url, [(name, PROMPTS[i]) for name, i in again], frozenset(with_tasks)))
        metrics = served.client.get("/metrics").text
    answers = dict(zip(calls, given, strict=True))
    assert {call: answers[call] for call in again} == dict(zip(again, found, strict=True)), "a prefix found is the same"
    hits = next(line for line in metrics.splitlines() if line.startswith("vllm:prefix_cache_hits_total"))
    assert (float(hits.rsplit(" ", 1)[1]) > 0) == (base_kind not in SEQ2SEQ)
    expected: dict[Call, list[int]] = {}
    for name, model, pair in asked:
        pairs = [(name, 2 * pair), (name, 2 * pair + 1)]
        tokens = greedy(model, PAIRS[pair], [answers[call] for call in pairs], num_new=NUM_NEW)
        expected |= zip(pairs, tokens, strict=True)
    assert {call: tokens for call, tokens in answers.items() if tokens != expected[call]} == {}
    # The adapters must matter, or equality would say nothing; on two prompts some are not heard.
    moved = {name for (name, i), tokens in expected.items() if tokens != expected["base", i]}
    assert len(moved) >= 0.6 * len(names)
    buckets = [line for line in metrics.splitlines() if line.startswith("peft_serve_step_distinct_adapters_bucket")]
    few = next(float(line.rsplit(" ", 1)[1]) for line in buckets if 'le="4.0"' in line)
    assert few < float(buckets[-1].rsplit(" ", 1)[1]), "no step held more than four adapters"
