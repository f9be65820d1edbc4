"""Captured decode steps of checkpoints that peft made, whose parts are computed for them alone: peft's own tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import pytest

from peft_serve.adapters.compiler import compile_adapter
from peft_serve.adapters.gate import inspect
from peft_serve.adapters.limits import GateLimits
from peft_serve.core import BASE
from tests.adapters.checkpoints import randomise, save
from tests.model.test_generation import expected
from tests.model.test_step_graphs import IS_INTERPRETED, LORA, Bench, adapter, llama

pytestmark = [
    pytest.mark.skipif(not IS_INTERPRETED, reason="the tiny models are on a CPU"),
    pytest.mark.filterwarnings("ignore"),  # what peft and the library say about each other
]

LINEAR = ["q_proj", "down_proj"]
CONFIGS: dict[str, Callable[[], Any]] = {
    "LOHA": lambda: peft.LoHaConfig(target_modules=LINEAR, r=7),
    "LOKR": lambda: peft.LoKrConfig(target_modules=LINEAR, r=3),
    "FOURIERFT": lambda: peft.FourierFTConfig(target_modules=LINEAR, n_frequency=40, scaling=30.0),
    "SHIRA": lambda: peft.ShiraConfig(target_modules=LINEAR, r=3),
    "C3A": lambda: peft.C3AConfig(target_modules=LINEAR, block_size=8),
    "RANDLORA": lambda: peft.RandLoraConfig(target_modules=LINEAR, r=3),
    "modules_to_save": lambda: peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "token rows": lambda: peft.LoraConfig(
        target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [7, 30, 11, 40]}
    ),
}


@pytest.mark.parametrize("method", CONFIGS)
def test_replayed_steps_give_what_peft_gives_alone(method: str) -> None:
    bench = Bench(llama)
    oracle: Any = peft.get_peft_model(llama(), CONFIGS[method]())
    randomise(oracle, 3)
    its = compile_adapter(inspect(save(oracle), bench.base, GateLimits()), bench.base, GateLimits())
    low_rank = adapter(bench.base, "c", LORA)
    bench.install(its, low_rank)
    names = its.id, BASE, low_rank.id, its.id
    for _ in range(2):
        bench.answers(*names)
    assert bench.outcomes == {"captured": 1, "replayed": 5}
    jobs = bench._jobs(names)
    bench.driver.finish(jobs, max_chunk=1, share=1.0)
    assert bench.outcomes == {"captured": 1, "replayed": 8}
    of_base = expected(llama(), jobs[0])[1]
    assert jobs[0].logprobs != pytest.approx(of_base, abs=1e-3), "the adapter matters"
    for job in (jobs[0], jobs[3]):
        output, logprobs = expected(oracle.eval(), job)
        assert job.output == output
        assert job.logprobs == pytest.approx(logprobs, abs=2e-4)
