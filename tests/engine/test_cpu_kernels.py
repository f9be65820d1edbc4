"""With kernels of our own, without them, and where there is no compiler: the same tokens."""

from __future__ import annotations

import os
import random
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import pytest
import torch

from peft_serve.config import Settings
from peft_serve.engine import cpu_kernels
from peft_serve.engine.cpu_kernels import speed_up
from peft_serve.kernels.few_rows import FewRows
from peft_serve.kernels.native import find_compiler
from peft_serve.model import packing
from peft_serve.model.base import ResidentBase
from tests.model.driver import Driver, Job, random_jobs
from tests.model.tiny_models import EVERY, VOCAB, tiny

FEW = ("llama", "mistral", "gpt2", "t5", "bart")
needs_compiler = pytest.mark.skipif(find_compiler(os.environ) is None, reason="this machine has no C++ compiler")
NO_COMPILER = {"PATH": ""}
_TOLERANCES = {"mt5": 1e-4, "t5-gated": 1e-4}  # unscaled scores: plain torch itself is 4e-5 off float64 here


def _sped_up(
    name: str, settings: Settings, environ: Mapping[str, str] = os.environ, dtype: torch.dtype = torch.float32
) -> tuple[ResidentBase, list[str]]:
    said: list[str] = []
    base = ResidentBase(tiny(name).to(dtype), name=name)
    speed_up(settings, base, environ, said.append)
    return base, said


def _jobs(base: ResidentBase) -> list[Job]:
    start = base.decoder_start_ids
    return random_jobs(random.Random(2), count=7, vocab=VOCAB, start=start, has_source=base.shape.is_encoder_decoder)


def _served(base: ResidentBase) -> list[Job]:
    jobs = _jobs(base)
    Driver(base, seed=1).finish(jobs)
    return jobs


@needs_compiler
@pytest.mark.parametrize("name", EVERY if os.environ.get("PEFT_SERVE_TEST_EVERY_BASE") else FEW)
def test_kernels_give_the_tokens_of_plain_torch(name: str) -> None:
    plain, _ = _sped_up(name, Settings(prepack="off", cpu_kernels="off"))
    ours, said = _sped_up(name, Settings(prepack="on", cpu_kernels="on"))
    assert said[-1] == "weights packed for our own kernels"
    for job, expected in zip(_served(ours), _served(plain), strict=True):
        assert job.output == expected.output
        assert job.logprobs == pytest.approx(expected.logprobs, abs=_TOLERANCES.get(name, 2e-5))


@needs_compiler
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_a_request_has_the_same_bits_alone_and_among_others(name: str) -> None:
    """Prompts of one token, so that every step is made of decode rows: what attends to a prompt is torch's."""
    base, _ = _sped_up(name, Settings(prepack="on", cpu_kernels="on"))
    together = [Job(prompt=(3 + i,), num_new=6 + i) for i in range(9)]
    Driver(base, seed=1).finish(together)
    for job in together:
        alone = Job(prompt=job.prompt, num_new=job.num_new)
        Driver(base, seed=2).finish([alone])
        assert alone.output == job.output
        assert alone.logprobs == job.logprobs  # equal, not nearly equal


@needs_compiler
def test_only_who_insists_has_kernels_for_bfloat16_where_torch_has_instructions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on a CPU with instructions for bfloat16 and no matrix unit."""
    monkeypatch.setattr(cpu_kernels, "FewRows", partial(FewRows, tiles=False))
    monkeypatch.setattr(packing, "_has_bfloat16_instructions", lambda: True)
    _, said = _sped_up("llama", Settings(cpu_kernels="auto"), dtype=torch.bfloat16)
    assert "weights packed for our own kernels" not in said
    _, said = _sped_up("llama", Settings(cpu_kernels="on"), dtype=torch.bfloat16)
    assert said[-1] == "weights packed for our own kernels"


@needs_compiler
def test_bfloat16_runs_on_kernels_too() -> None:
    ours, said = _sped_up("llama", Settings(prepack="auto", cpu_kernels="on"), dtype=torch.bfloat16)
    assert said[-1] == "weights packed for our own kernels"
    plain, _ = _sped_up("llama", Settings(prepack="off", cpu_kernels="off"), dtype=torch.bfloat16)
    for job, expected in zip(_served(ours), _served(plain), strict=True):
        assert job.logprobs[0] == pytest.approx(expected.logprobs[0], abs=0.1)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_without_a_compiler_the_server_starts_and_says_what_is_lost(name: str) -> None:
    base, said = _sped_up(name, Settings(prepack="auto", cpu_kernels="auto"), NO_COMPILER)
    assert "as long" in said[0]
    assert "install g++ or clang++" in said[0]
    plain, silent = _sped_up(name, Settings(prepack="off", cpu_kernels="off"), NO_COMPILER)
    assert not silent
    assert [job.output for job in _served(base)] == [job.output for job in _served(plain)]


def test_a_server_that_must_have_kernels_does_not_start_without() -> None:
    with pytest.raises(ValueError, match=r"--cpu-kernels on: no C\+\+ compiler.*leave the option out"):
        _sped_up("llama", Settings(cpu_kernels="on"), NO_COMPILER)


@needs_compiler
def test_a_cache_that_cannot_be_written_costs_the_kernels_only(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    environ = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "file")}
    _, said = _sped_up("llama", Settings(), environ)
    assert "XDG_CACHE_HOME" in said[-2] or "XDG_CACHE_HOME" in said[0]
