"""Bases, adapters, and peft's loops: they load, they differ, and the three loops say the same."""

from __future__ import annotations

import io
import json
import sys
import zipfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from loadtest.adapters import ATTENTION, FEED_FORWARD, adapter_name, make_adapters, mixture
from loadtest.bases import check_tokenizer, ensure_base, shapes
from loadtest.lengths import parse_lengths
from loadtest.peft_loops import PeftAnswer, PeftJob, main, run_in_subprocess, run_job
from loadtest.peft_plan import Mode, next_batch, plan_batches
from loadtest.prompts import synthetic_text, words
from loadtest.trace import BASE, Trace, TraceSpec, build_trace
from loadtest.upload import zip_of
from loadtest.vocabulary import MIN_VOCABULARY, make_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore")  # peft and transformers warn about each other's names


def load(base: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(base).eval()


def test_every_word_is_one_token_and_every_id_is_text() -> None:
    tokenizer = make_tokenizer(1024)
    assert tokenizer.get_vocab_size() == 1024
    text = synthetic_text(50, np.random.default_rng(0), words())
    ids = tokenizer.encode(text).ids
    assert len(ids) == 50
    assert tokenizer.decode(ids) == text
    for word in words():
        assert len(tokenizer.encode(f" {word}").ids) == 1
    assert len({tokenizer.id_to_token(number) for number in range(1024)}) == 1024
    assert tokenizer.decode(tokenizer.encode("Any text, even ünïcode!").ids) == "Any text, even ünïcode!"


def test_a_vocabulary_too_small_is_refused() -> None:
    with pytest.raises(ValueError, match=str(MIN_VOCABULARY)):
        make_tokenizer(MIN_VOCABULARY - 1)


def test_the_bases_have_the_sizes_their_names_say() -> None:
    assert shapes()["0.5b"].config().hidden_size == 896
    for name, shape in shapes().items():
        assert shape.hidden == 64 * shape.heads, name
        assert shape.vocabulary >= MIN_VOCABULARY


def test_a_base_loads_counts_tokens_exactly_and_is_made_once(tiny_work: Path, tiny_base: Path) -> None:
    text = synthetic_text(17, np.random.default_rng(1), words())
    assert len(check_tokenizer(tiny_base, text)) == 17
    stamp = (tiny_base / "config.json").stat().st_mtime_ns
    assert ensure_base("tiny", tiny_work) == tiny_base
    assert ensure_base(str(tiny_base), tiny_work) == tiny_base
    assert (tiny_base / "config.json").stat().st_mtime_ns == stamp
    with pytest.raises(ValueError, match="neither"):
        ensure_base("nowhere", tiny_work)


@pytest.mark.parametrize("number", range(5))
def test_adapters_of_every_kind_load_in_peft_and_change_the_answer(
    number: int, tiny_base: Path, mixed_adapters: list[Path]
) -> None:
    from peft import PeftModel

    ids = torch.tensor([check_tokenizer(tiny_base, " abe ban dad ora")])
    plain = load(tiny_base)(ids).logits[:, -1]
    adapted = PeftModel.from_pretrained(load(tiny_base), mixed_adapters[number]).eval()
    kinds = ["LORA", "LORA", "IA3", "PROMPT_TUNING", "PREFIX_TUNING"]
    assert adapted.peft_config["default"].peft_type.value == kinds[number]
    with torch.inference_mode():
        moved = (adapted(input_ids=ids).logits[:, -1] - plain).abs().max().item()
    assert 0.01 < moved < 100


def test_adapters_are_the_same_however_many_are_made(tiny_base: Path, tmp_path: Path) -> None:
    few = list(make_adapters(tiny_base, tmp_path / "few", mixture("S2"), 2))
    many = list(make_adapters(tiny_base, tmp_path / "many", mixture("S2"), 6))
    weights = [(folder / "adapter_model.safetensors").read_bytes() for folder in many]
    assert [(folder / "adapter_model.safetensors").read_bytes() for folder in few] == weights[:2]
    assert len(set(weights)) == 6
    assert [folder.name for folder in many] == [adapter_name(number) for number in range(6)]


def test_mixtures_by_name() -> None:
    assert [kind.size for kind in mixture("S2")] == [64, 32, 16, 8]
    assert mixture("S1")[0].targets == ATTENTION + FEED_FORWARD
    assert mixture("lora:4", targets=ATTENTION)[0].size == 4
    assert mixture("prefix:7")[0].size == 7
    with pytest.raises(ValueError, match="S1, S2"):
        mixture("S3")


def test_an_upload_holds_the_folders_files(mixed_adapters: list[Path]) -> None:
    with zipfile.ZipFile(io.BytesIO(zip_of(mixed_adapters[0]))) as archive:
        assert archive.namelist() == ["adapter_config.json", "adapter_model.safetensors"]


SPEC = TraceSpec(
    adapters=("a00000", "a00001", "a00002"), lengths=parse_lengths("1-12,2-6"), popularity="uniform", num_requests=11
)


@pytest.mark.parametrize("mode", ["single", "mixed", "sorted"])
@pytest.mark.parametrize("window", [0, 5])
def test_plans_hold_every_request_once(mode: Mode, window: int) -> None:
    requests = build_trace(replace(SPEC, popularity="slora:1")).requests
    batches = plan_batches(requests, mode, batch_size=4, window=window)
    indexes = [request.index for batch in batches for request in batch.requests]
    assert sorted(indexes) == list(range(11))
    assert all(1 <= len(batch.requests) <= 4 for batch in batches)
    if mode == "single":
        assert all(len({request.adapter for request in batch.requests}) == 1 for batch in batches)
    if mode == "mixed":
        assert indexes == list(range(11))
    if mode == "sorted" and not window:
        names = [request.adapter for batch in batches for request in batch.requests]
        assert names == sorted(names)


@pytest.mark.parametrize("mode", ["single", "mixed", "sorted"])
def test_the_next_batch_holds_who_waited_longest(mode: Mode) -> None:
    waiting = build_trace(replace(SPEC, popularity="slora:1")).requests
    batch = next_batch(waiting, mode, batch_size=4, window=6)
    assert waiting[0] in batch.requests
    assert set(batch.requests) <= set(waiting[:6])
    names = [request.adapter for request in batch.requests]
    if mode == "single":
        assert names == [waiting[0].adapter] * len(names)
        assert not batch.by_names
    else:
        assert len(names) == 4
    if mode == "sorted":
        assert len([name for name, before in zip(names[1:], names, strict=False) if name != before]) < len(set(names))


@pytest.fixture(scope="module")
def lora_job(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> PeftJob:
    """A trace over three LoRAs and the base, for peft's loops on the tiny base."""
    folder = tmp_path_factory.mktemp("peft")
    list(make_adapters(tiny_base, folder / "adapters", mixture("S2"), 3))
    requests = build_trace(replace(SPEC, popularity="slora:1")).requests
    some_base = tuple(replace(one, adapter=BASE) if one.index % 4 == 3 else one for one in requests)
    Trace(requests=some_base).save(folder / "trace.json")
    return PeftJob(
        base=str(tiny_base),
        adapters=str(folder / "adapters"),
        trace=str(folder / "trace.json"),
        mode="single",
        batch_size=4,
    )


@pytest.fixture(scope="module")
def alone(lora_job: PeftJob) -> PeftAnswer:
    """Every request by itself."""
    return run_job(replace(lora_job, batch_size=1))


@pytest.mark.parametrize("mode", ["single", "mixed", "sorted"])
def test_batching_does_not_change_pefts_answers(mode: Mode, lora_job: PeftJob, alone: PeftAnswer) -> None:
    answer = run_job(replace(lora_job, mode=mode))
    assert answer.tokens == alone.tokens
    assert answer.num_tokens == sum(map(len, answer.tokens.values()))
    assert answer.tokens_per_s > 0
    for index, times in answer.times_s.items():
        assert len(times) == len(answer.tokens[index])
        assert answer.begun_s[index] < times[0]
        assert times == sorted(times)
        assert times[-1] <= answer.seconds


def test_a_paced_loop_waits_for_its_requests(lora_job: PeftJob, alone: PeftAnswer) -> None:
    trace = Trace.load(Path(lora_job.trace))
    later = tuple(replace(request, arrival_s=1000.0 * (request.index > 2)) for request in trace.requests)
    path = Path(lora_job.trace).with_name("later.json")
    Trace(requests=later).save(path)
    now = [0.0]
    answer = run_job(
        replace(lora_job, trace=str(path), mode="mixed", paced=True),
        clock=lambda: now[0],
        sleep=lambda seconds: now.__setitem__(0, now[0] + seconds),
    )
    assert answer.tokens == alone.tokens
    assert {begun for index, begun in answer.begun_s.items() if index <= 2} == {0.0}
    assert {begun for index, begun in answer.begun_s.items() if index > 2} == {1000.0}


def test_adapters_matter_in_the_trace(lora_job: PeftJob, alone: PeftAnswer) -> None:
    trace = Trace.load(Path(lora_job.trace))
    bare = Trace(requests=tuple(replace(request, adapter=BASE) for request in trace.requests))
    path = Path(lora_job.trace).with_name("bare.json")
    bare.save(path)
    without = run_job(replace(lora_job, trace=str(path), batch_size=4))
    by_base = {request.index for request in trace.requests if request.adapter == BASE}
    assert {index for index, ids in without.tokens.items() if ids == alone.tokens[index]} >= by_base
    assert sum(ids == alone.tokens[index] for index, ids in without.tokens.items()) < len(trace.requests)


def test_a_loop_reads_and_writes_files(lora_job: PeftJob, alone: PeftAnswer, tmp_path: Path) -> None:
    job, answer = tmp_path / "job.json", tmp_path / "answer.json"
    job.write_text(json.dumps(asdict(replace(lora_job, mode="mixed"))))
    assert main([str(job), str(answer)]) == 0
    copying = f"import shutil, sys; shutil.copy({str(answer)!r}, sys.argv[2])"
    read = run_in_subprocess(lora_job, tmp_path, program=(sys.executable, "-c", copying))
    assert read.tokens == alone.tokens
    assert json.loads((tmp_path / "peft-single-job.json").read_text()) == asdict(lora_job)


def test_a_loop_that_fails_says_why(lora_job: PeftJob, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="no memory"):
        run_in_subprocess(lora_job, tmp_path, program=(sys.executable, "-c", "raise SystemExit('no memory')"))
